//! What an operator looks at: health, readiness and metrics on one HTTP port, and the doctor.

pub mod doctor;
mod http;
mod scrape;

pub use http::{Watched, serve};
