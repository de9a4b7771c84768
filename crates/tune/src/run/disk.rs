//! The file operations of a run, behind a trait so that tests can make each of them fail.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

/// What a run asks of its file system. Nothing else in [`run`](crate::run) writes.
pub trait Disk: Debug {
    /// Makes a directory and those above it.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Writes a file whole and forces it to the disk.
    fn write(&self, path: &Path, fill: &mut Fill<'_>) -> io::Result<()>;

    /// Cuts a file to `length` bytes and appends `bytes`; makes it where it is missing.
    fn append(&self, path: &Path, length: u64, bytes: &[u8]) -> io::Result<()>;

    /// Forces a file to the disk.
    fn sync(&self, path: &Path) -> io::Result<()>;

    /// Gives a file or directory another name in the same directory, at once and lastingly.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file or a directory with all it holds; does nothing where there is none.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// What puts a file's bytes into it.
pub type Fill<'a> = dyn FnMut(&mut dyn Write) -> io::Result<()> + 'a;

/// The local file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalDisk;

impl Disk for LocalDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn write(&self, path: &Path, fill: &mut Fill<'_>) -> io::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        fill(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()
    }

    fn append(&self, path: &Path, length: u64, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        file.set_len(length)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(bytes)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        // The names inside a directory must be on the disk before the directory itself is visible.
        if cfg!(unix) && from.is_dir() {
            File::open(from)?.sync_all()?;
        }
        fs::rename(from, to)?;
        match to.parent() {
            Some(parent) if cfg!(unix) => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let found = match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(error) => Err(error),
        };
        match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// Writes a file beside its place and renames it: whoever looks finds the old one or the new one, whole.
pub(super) fn replace(disk: &dyn Disk, path: &Path, fill: &mut Fill<'_>) -> io::Result<()> {
    let partial = path.with_extension("partial");
    disk.write(&partial, fill)?;
    disk.rename(&partial, path)
}
