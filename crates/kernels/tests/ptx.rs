//! The embedded PTX is that of the sources beside it, and every kernel can be found by its name.

use std::collections::BTreeSet;
use std::path::Path;

use lora_sb_kernels::cuda::module::{MODULES, kernels};
use sha2::{Digest, Sha256};

/// A source and what it includes, in order, as `scripts/make_ptx.py` adds them up.
fn add(sum: &mut Sha256, src: &Path, name: &str) {
    let text = std::fs::read_to_string(src.join(name)).unwrap();
    sum.update(&text);
    for line in text.lines() {
        let included = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        if let Some(included) = included.filter(|included| src.join(included).exists()) {
            add(sum, src, included);
        }
    }
}

#[test]
fn is_current() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for module in MODULES {
        let mut sum = Sha256::new();
        add(&mut sum, &src, module.source);
        let sum: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let stated = module.ptx.lines().next().unwrap();
        assert_eq!(
            stated,
            format!("// sources sha256 {sum}"),
            "{}.ptx is of other sources than {}: run scripts/make_ptx.py",
            module.name,
            module.source
        );
    }
}

#[test]
fn every_source_is_embedded() {
    let ops = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/op");
    let mut found = BTreeSet::new();
    for op in std::fs::read_dir(&ops).unwrap() {
        for file in std::fs::read_dir(op.unwrap().path()).into_iter().flatten() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "cu") {
                found.insert(format!("op/{}", path.strip_prefix(&ops).unwrap().display()));
            }
        }
    }
    let embedded: BTreeSet<String> = MODULES.iter().map(|module| module.source.to_string()).collect();
    assert_eq!(embedded, found);
}

#[test]
fn no_two_kernels_share_a_name() {
    let mut names = BTreeSet::new();
    for (index, module) in MODULES.iter().enumerate() {
        let mut count = 0;
        for kernel in kernels(index) {
            assert!(names.insert(kernel.name), "`{}` is in two modules", kernel.name);
            count += 1;
        }
        assert!(count > 0, "{} holds no kernel", module.name);
    }
}
