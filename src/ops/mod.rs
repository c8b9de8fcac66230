//! What an operator looks at: health and readiness, metrics, and the doctor.

pub mod doctor;
mod http;
mod scrape;

pub use http::{Served, Watched, serve};
