//! What an operator looks at: health and readiness, metrics, and the doctor; what is done where a server has moved, and what lies on one.

pub mod cluster;
pub mod doctor;
mod http;
pub mod moved;
mod scrape;
pub mod store;

pub use http::{Served, Watched, serve};
