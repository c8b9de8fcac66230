//! The index of an image that is several: which files its layers are.

use serde::Deserialize;

use super::MAX_LOWER;
use super::error::quote;

/// How the name of an index ends: whoever writes a spec says by it that the image is several.
pub(super) const ENDING: &str = ".json";

/// As the builder writes it; what else it says is not about mounts.
#[derive(Deserialize)]
struct Index {
    /// Names of files beside the index, the lowest first.
    layers: Vec<String>,
}

/// The names of the layers, uppermost first. Anybody may have written the index: they lie beside it, and are no indexes themselves.
pub fn parse(text: &[u8]) -> Result<Vec<String>, String> {
    let Index { mut layers } =
        serde_json::from_slice(text).map_err(|error| format!("it is no index of layers: {error}"))?;
    let is_name = |name: &&String| {
        let is_plain = !name.contains(['/', '\0']) && !matches!(name.as_str(), "" | "." | "..");
        is_plain && name.len() <= 255 && !name.ends_with(ENDING)
    };
    if let Some(other) = layers.iter().find(|name| !is_name(name)) {
        return Err(format!("{} is no name of a layer, which is a file beside the index", quote(other)));
    }
    if layers.is_empty() || layers.len() > MAX_LOWER {
        return Err(format!("it names {} layers, and there may be 1 to {MAX_LOWER}", layers.len()));
    }
    layers.reverse();
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_are_files_beside_the_index() {
        assert_eq!(parse(br#"{"source":"oci://a","layers":["a.sqsh","b.sqsh"]}"#).unwrap(), ["b.sqsh", "a.sqsh"]);
        for (text, why) in [
            (r#"{"layers":[]}"#.to_owned(), "names 0 layers"),
            (format!(r#"{{"layers":[{}"a"]}}"#, r#""a","#.repeat(MAX_LOWER)), "names 21 layers"),
            (r#"{"layers":["a","../b"]}"#.into(), "no name of a layer"),
            (r#"{"layers":["/b"]}"#.into(), "no name of a layer"),
            (r#"{"layers":[".."]}"#.into(), "no name of a layer"),
            (r#"{"layers":["a\u0000"]}"#.into(), "no name of a layer"),
            (r#"{"layers":["a.json"]}"#.into(), "no name of a layer"),
            ("{}".into(), "missing field"),
            ("hsqs".into(), "no index of layers"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
