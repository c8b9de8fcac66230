//! What an operator looks at: health and readiness, metrics, and the doctor; and what is done where a server has moved.

pub mod doctor;
mod http;
pub mod moved;
mod scrape;

pub use http::{Served, Watched, serve};
