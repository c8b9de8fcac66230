//! What is about Kubernetes beyond CSI: the kubelet's plugin registration, claims that name their image, and what becomes of a
//! container of the ImageAPI.

pub mod claim;
pub mod convert;
pub mod registration;
