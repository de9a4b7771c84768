//! Compiling the kernels for the processor.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use crate::cuda::module::{MODULES, Module, kernels};

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    // Every threadIdx reads a variable of the thread; this way it is no call.
    #[cfg(target_arch = "x86_64")]
    "-mtls-dialect=gnu2",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-fno-strict-aliasing",
    // A GPU faults at a vector that is not aligned for its size; so does this, without a library.
    "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
    "-DEMULATED",
    "-w",
    "-x",
    "c++",
];

/// One process builds at a time, for all its threads.
static BUILDING: Mutex<()> = Mutex::new(());

/// The library's path, built where it is not there yet; `None` where no compiler is found.
pub(in crate::cuda) fn library() -> Result<Option<PathBuf>, String> {
    let _one = BUILDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let probe = Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        return Ok(None);
    }
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let out = program.parent().ok_or("a program without a directory")?.join("cuda-emulator");
    std::fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let build = Build { compiler, src: Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), out };
    build.run().map(Some)
}

/// A module as C++. What it defines is its own: the linker would take one for another where two modules' functions or shared
/// variables have a name in common.
fn unit(module: &Module, registered: &str) -> String {
    let Module { name, source, .. } = module;
    format!("#include \"emulator.hpp\"\nnamespace of_{name} {{\n#include \"{source}\"\n{registered}}}\n")
}

struct Build {
    compiler: String,
    src: PathBuf,
    out: PathBuf,
}

impl Build {
    fn run(&self) -> Result<PathBuf, String> {
        let shared = [self.read("cuda/prelude.cuh")?, self.read("cuda/emulator/emulator.hpp")?];
        let mut units = vec![(
            "emulator".to_string(),
            "#include \"emulator.cpp\"\n".to_string(),
            self.read("cuda/emulator/emulator.cpp")?,
        )];
        for (index, module) in MODULES.iter().enumerate() {
            let registered = kernels(index).map(|kernel| format!("EMULATE({});\n", kernel.name));
            let unit = unit(module, &registered.collect::<String>());
            units.push((module.name.to_string(), unit, self.with_includes(module.source)?));
        }
        let objects: Vec<PathBuf> = units
            .iter()
            .map(|(name, unit, source)| {
                self.out
                    .join(format!("{name}-{:016x}.o", sum(&(&shared, unit, source, FLAGS, &self.compiler))))
            })
            .collect();
        let mut running: Vec<(PathBuf, PathBuf, Child)> = Vec::new();
        for ((name, unit, _), object) in units.iter().zip(&objects) {
            if object.exists() {
                continue;
            }
            if running.len() >= 2 {
                finish(running.remove(0))?;
            }
            let (file, part) =
                (self.out.join(format!("{name}-{}.cpp", std::process::id())), self.own(object));
            std::fs::write(&file, unit).map_err(|error| format!("{}: {error}", file.display()))?;
            let child = self.compile(&file, &part)?;
            let _ = name;
            running.push((part, object.clone(), child));
        }
        running.into_iter().try_for_each(finish)?;
        self.link(&objects)
    }

    fn compile(&self, file: &Path, object: &Path) -> Result<Child, String> {
        let mut command = Command::new(&self.compiler);
        command.args(FLAGS).arg("-c").arg(file).arg("-o").arg(object);
        command
            .arg("-I")
            .arg(&self.src)
            .arg("-I")
            .arg(self.src.join("cuda"))
            .arg("-I")
            .arg(self.src.join("cuda/emulator"));
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", self.compiler))
    }

    fn link(&self, objects: &[PathBuf]) -> Result<PathBuf, String> {
        let library = self.out.join(format!("cuda-emulator-{:016x}.so", sum(&objects)));
        if library.exists() {
            return Ok(library);
        }
        let part = self.own(&library);
        let mut command = Command::new(&self.compiler);
        command.arg("-shared").args(objects).arg("-o").arg(&part);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        finish((part, library.clone(), child))?;
        Ok(library)
    }

    /// The same name, of this process alone.
    fn own(&self, path: &Path) -> PathBuf {
        path.with_extension(format!("{}.part", std::process::id()))
    }

    fn read(&self, name: &str) -> Result<String, String> {
        let path = self.src.join(name);
        std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// A source and what it includes by a path from `src`.
    fn with_includes(&self, name: &str) -> Result<String, String> {
        let source = self.read(name)?;
        let mut all = source.clone();
        for line in source.lines() {
            if let Some(included) = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'))
                && included != "cuda/prelude.cuh"
            {
                all += &self.with_includes(included)?;
            }
        }
        Ok(all)
    }
}

/// Waits for a compiler and puts what it made in its place.
fn finish((part, whole, child): (PathBuf, PathBuf, Child)) -> Result<(), String> {
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("{}:\n{}", whole.display(), String::from_utf8_lossy(&output.stderr)));
    }
    std::fs::rename(&part, &whole).map_err(|error| format!("{}: {error}", whole.display()))
}

fn sum(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}
