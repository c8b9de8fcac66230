//! The index of an image that is several: which files its layers are.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::error::quote;
use super::{MAX_LOWER, Verity};

/// How the name of an index ends: whoever writes a spec says by it that the image is several.
pub(super) const ENDING: &str = ".json";

/// As the builder writes it; what else it says is not about mounts.
#[derive(Deserialize)]
struct Index {
    /// Names of files beside the index, the lowest first.
    layers: Vec<String>,
    /// The root hashes of their trees, by name.
    #[serde(default)]
    verity: BTreeMap<String, String>,
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Of a file beside the index.
    pub name: String,
    /// The root hash that the index names.
    pub verity: Option<Verity>,
}

/// The layers, uppermost first. Anybody may have written the index: they lie beside it, and are no indexes themselves.
pub fn parse(text: &[u8]) -> Result<Vec<Layer>, String> {
    let Index { layers, verity } =
        serde_json::from_slice(text).map_err(|error| format!("it is no index of layers: {error}"))?;
    if layers.is_empty() || layers.len() > MAX_LOWER {
        return Err(format!("it names {} layers, and there may be 1 to {MAX_LOWER}", layers.len()));
    }
    if let Some(double) = layers.iter().find(|name| layers.iter().filter(|other| other == name).count() > 1) {
        return Err(format!("it names layer {} twice", quote(double)));
    }
    let layer = |name: String| {
        let is_plain = !name.contains(['/', '\0']) && !matches!(name.as_str(), "" | "." | "..");
        if !is_plain || name.len() > 255 || name.ends_with(ENDING) {
            return Err(format!("{} is no name of a layer, which is a file beside the index", quote(&name)));
        }
        let verity = verity.get(&name).map(|root| Verity::parse(root)).transpose()?;
        if verity == Some(Verity::Signed) {
            return Err(format!("the root hash of layer {} is none", quote(&name)));
        }
        Ok(Layer { name, verity })
    };
    layers.into_iter().rev().map(layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_are_files_beside_the_index() {
        let root = "01".repeat(32);
        let text = format!(r#"{{"source":"oci://a","layers":["a.sqsh","b.sqsh"],"verity":{{"b.sqsh":"{root}"}}}}"#);
        let layer = |name: &str, verity| Layer { name: name.into(), verity };
        let expected = [layer("b.sqsh", Some(Verity::Root([1; 32]))), layer("a.sqsh", None)];
        assert_eq!(parse(text.as_bytes()).unwrap(), expected);
        for (text, why) in [
            (r#"{"layers":[]}"#.to_owned(), "names 0 layers"),
            (
                format!(r#"{{"layers":[{}"a"]}}"#, (0..MAX_LOWER).map(|n| format!("\"{n}\",")).collect::<String>()),
                "names 21 layers",
            ),
            (r#"{"layers":["a","b","a"]}"#.into(), "twice"),
            (r#"{"layers":["a","../b"]}"#.into(), "no name of a layer"),
            (r#"{"layers":["/b"]}"#.into(), "no name of a layer"),
            (r#"{"layers":[".."]}"#.into(), "no name of a layer"),
            (r#"{"layers":["a\u0000"]}"#.into(), "no name of a layer"),
            (r#"{"layers":["a.json"]}"#.into(), "no name of a layer"),
            (r#"{"layers":["a"],"verity":{"a":"signed"}}"#.into(), "is none"),
            (r#"{"layers":["a"],"verity":{"a":"1234"}}"#.into(), "no root hash"),
            ("{}".into(), "missing field"),
            ("hsqs".into(), "no index of layers"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
