//! Where cuBLASLt is. It is no part of the driver: the CUDA toolkit has it, and so has every Python environment with PyTorch.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::super::library::Absence;
use super::api::Api;
use crate::cuda::probe::Products;

/// Names a library file, and then no other is looked for.
const NAMED: &str = "LORA_SB_CUBLASLT";

/// Folders of a CUDA toolkit; `*` stands for the rest of a name.
const TOOLKITS: [&str; 4] =
    ["usr/local/cuda/lib64", "usr/local/cuda-*/lib64", "usr/local/cuda*/targets/*/lib", "opt/cuda/lib64"];

/// Folders of a Python installation's packages, from its prefix.
const PACKAGES: [&str; 4] = [
    "lib/python3*/site-packages",
    "lib/python3*/dist-packages",
    "local/lib/python3*/dist-packages",
    "lib64/python3*/site-packages",
];

/// Folders in packages that pip installs the library to: CUDA 12's and CUDA 13's.
const PIP: [&str; 2] = ["nvidia/cublas/lib", "nvidia/cu13/lib"];

/// Where to look.
#[derive(Clone, Debug, Default)]
pub(in crate::cuda::nvidia) struct Search {
    /// A file, and then nothing else.
    pub(super) named: Option<PathBuf>,
    /// Whether the system's own search by name comes first.
    pub(super) by_name: bool,
    /// The root of the file system.
    pub(super) root: PathBuf,
    /// Prefixes of Python installations.
    pub(super) prefixes: Vec<PathBuf>,
}

impl Search {
    /// Of this process: its environment and its system.
    pub(in crate::cuda::nvidia) fn of_the_process() -> Search {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Search {
            named: variable(NAMED).map(PathBuf::from),
            by_name: true,
            root: "/".into(),
            prefixes: prefixes(variable),
        }
    }

    /// For one file.
    #[cfg(test)]
    pub(in crate::cuda::nvidia) fn only(file: PathBuf) -> Search {
        Search { named: Some(file), ..Search::default() }
    }

    /// The library, and what was found where; `driver` is the CUDA version that the driver supports.
    pub(super) fn load(&self, driver: (u32, u32)) -> (Option<Api>, Products) {
        let mut products = Products::default();
        if let Some(file) = &self.named {
            let api = try_to_load(file, &format!("{NAMED}={}", file.display()), &mut products);
            return (api, products);
        }
        for major in majors(driver) {
            let file = format!("libcublasLt.so.{major}");
            if self.by_name
                && let Some(api) = try_to_load(Path::new(&file), &format!("{file} by name"), &mut products)
            {
                return (Some(api), products);
            }
            for (place, folders) in self.places() {
                let files =
                    folders.iter().flat_map(|folder| expanded(folder)).map(|folder| folder.join(&file));
                let files: Vec<PathBuf> = files.filter(|path| path.exists()).collect();
                if files.is_empty() {
                    products.searched.push(format!("{place}: no {file}"));
                }
                for path in files {
                    let shown = path.display().to_string();
                    if let Some(api) = try_to_load(&path, &shown, &mut products) {
                        return (Some(api), products);
                    }
                }
            }
        }
        (None, products)
    }

    /// Places in words and the patterns of their folders, in the order they are looked through.
    fn places(&self) -> impl Iterator<Item = (String, Vec<PathBuf>)> {
        let toolkits = TOOLKITS.map(|folder| self.root.join(folder)).to_vec();
        let own = self.prefixes.iter().map(|prefix| {
            let packages =
                PACKAGES.iter().flat_map(|packages| PIP.map(|folder| prefix.join(packages).join(folder)));
            // Conda has the library itself, beside its Python.
            let folders = packages.chain([prefix.join("lib")]).collect();
            (format!("Python packages in {}", prefix.display()), folders)
        });
        [("CUDA toolkits".to_owned(), toolkits)].into_iter().chain(own)
    }
}

/// Versions of the library that a driver can run, the first the first to be looked for. A driver runs what was made for
/// any CUDA of its own major version, and of those before.
fn majors((major, _): (u32, u32)) -> impl Iterator<Item = u32> {
    (12..=major.min(13)).rev()
}

/// Prefixes of Python installations: those that are activated, of every `python3` on the path, the user's own, and the
/// system's.
fn prefixes(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let activated = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(&variable).map(PathBuf::from);
    let path = variable("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).filter(|folder| folder.join("python3").exists());
    let on_path = on_path.filter_map(|folder| prefix_of(&folder));
    let own = variable("HOME").map(|home| PathBuf::from(home).join(".local"));
    let mut all: Vec<PathBuf> = Vec::new();
    for prefix in activated.chain(on_path).chain(own).chain(["/usr".into(), "/usr/local".into()]) {
        // One that is reached by a link is looked through once.
        let prefix = prefix.canonicalize().unwrap_or(prefix);
        if !all.contains(&prefix) {
            all.push(prefix);
        }
    }
    all
}

/// The prefix of a `python3`'s folder; pyenv's folder holds scripts that stand for those of its versions.
fn prefix_of(folder: &Path) -> Option<PathBuf> {
    let folder = folder.canonicalize().ok()?;
    let prefix = folder.parent()?;
    Some(if folder.ends_with("shims") { prefix.join("versions/*") } else { prefix.to_owned() })
}

fn try_to_load(path: &Path, place: &str, products: &mut Products) -> Option<Api> {
    match Api::load(path) {
        Ok(api) => {
            products.searched.push(format!("{place}: found"));
            products.found = Some((path.display().to_string(), api.version()));
            Some(api)
        }
        Err(Absence::Library(message)) => {
            // The system's words begin with the name itself.
            let message = message.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&message);
            products.searched.push(format!("{place}: {message}"));
            None
        }
        Err(absence) => {
            products.searched.push(format!("{place}: {absence}"));
            None
        }
    }
}

/// The folders that a pattern stands for, the last by name first: of several versions the newest, as a rule.
fn expanded(pattern: &Path) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    for part in pattern.components() {
        let part = part.as_os_str();
        match part.to_str().and_then(|text| text.split_once('*')) {
            None => found.iter_mut().for_each(|folder| folder.push(part)),
            Some((start, end)) => {
                found = found.iter().flat_map(|folder| matching(folder, start, end)).collect()
            }
        }
    }
    found
}

fn matching(folder: &Path, start: &str, end: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let fits =
        |name: &str| name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end);
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_str().is_some_and(fits))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_runs_libraries_up_to_its_own_version() {
        assert_eq!(majors((12, 4)).collect::<Vec<_>>(), [12]);
        assert_eq!(majors((13, 0)).collect::<Vec<_>>(), [13, 12]);
        assert_eq!(majors((14, 1)).collect::<Vec<_>>(), [13, 12]);
    }

    #[test]
    fn patterns_stand_for_what_is_there_the_newest_first() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["cuda-12.1/lib64", "cuda-12.4/lib64", "cuda/lib64", "other"] {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let found = |pattern: &str| -> Vec<String> {
            let name = |path: PathBuf| path.strip_prefix(root.path()).unwrap().display().to_string();
            expanded(&root.path().join(pattern)).into_iter().map(name).collect()
        };
        assert_eq!(found("cuda-*/lib64"), ["cuda-12.4/lib64", "cuda-12.1/lib64"]);
        assert_eq!(found("c*a/lib64"), ["cuda/lib64"]);
        assert_eq!(found("none*/lib64"), Vec::<String>::new());
    }

    #[test]
    fn environments_are_looked_through_before_the_system() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str| root.path().canonicalize().unwrap().join(name);
        for python in ["conda/bin", "pyenv/shims"] {
            std::fs::create_dir_all(folder(python)).unwrap();
            std::fs::write(folder(python).join("python3"), "").unwrap();
        }
        let path =
            ["none/bin", "conda/bin", "pyenv/shims"].map(folder).into_iter().chain(["/usr/bin".into()]);
        let path = std::env::join_paths(path).unwrap();
        let found = prefixes(|name| match name {
            "VIRTUAL_ENV" => Some(folder("venv").into()),
            "HOME" => Some(folder("home").into()),
            "PATH" => Some(path.clone()),
            _ => None,
        });
        assert_eq!(found[..3], ["venv", "conda", "pyenv/versions/*"].map(folder));
        assert!(found.contains(&folder("home/.local")) && !found.contains(&folder("none")));
        assert_eq!(found.iter().filter(|prefix| **prefix == Path::new("/usr")).count(), 1);
    }

    #[test]
    fn what_is_not_found_says_where_it_was_looked_for() {
        let root = tempfile::tempdir().unwrap();
        let venv = root.path().join("venv");
        let pip = venv.join("lib/python3.12/site-packages/nvidia/cublas/lib");
        std::fs::create_dir_all(&pip).unwrap();
        std::fs::write(pip.join("libcublasLt.so.12"), "no library").unwrap();
        let search = Search { root: root.path().into(), prefixes: vec![venv], ..Search::default() };
        let (api, products) = search.load((12, 4));
        assert!(api.is_none() && products.found.is_none());
        let line = |text: &str| products.searched.iter().find(|line| line.contains(text));
        assert!(line("CUDA toolkits: no libcublasLt.so.12").is_some(), "{products:?}");
        let broken = line("python3.12").unwrap_or_else(|| panic!("{products:?}"));
        assert!(broken.starts_with(&pip.display().to_string()) && !broken.ends_with(": found"), "{broken}");
        assert!(line("so.13").is_none());
        let named = Search { named: Some("/none/libcublasLt.so".into()), by_name: true, ..search };
        let (_, products) = named.load((12, 4));
        assert_eq!(products.searched.len(), 1);
        assert!(products.searched[0].starts_with("LORA_SB_CUBLASLT=/none/libcublasLt.so: "), "{products:?}");
    }
}
