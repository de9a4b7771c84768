//! Functions of a library that is looked for when the program runs.
//!
//! The bindings are ours: those of the crate `cudarc` panic where a library or one of its functions is missing, look for
//! the libraries of one CUDA version, and are the larger part of a build.

use std::error::Error;
use std::fmt;

/// An opaque pointer of a library's; 0 is none. It is handed back to the library and never followed.
pub(super) type Handle = usize;

/// Why a library cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Absence {
    /// It is not there, or the system refuses to load it for this reason.
    Library(String),
    /// It has no function of this name.
    Function(&'static str),
}

impl Absence {
    /// The system's own words, which the error has as its source.
    pub(super) fn of(error: libloading::Error) -> Absence {
        Absence::Library(error.source().map_or_else(|| error.to_string(), <dyn Error>::to_string))
    }
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Absence::Library(message) => f.write_str(message),
            Absence::Function(name) => write!(f, "the library has no function {name}"),
        }
    }
}

/// Declares a struct of a library's functions. A function's method returns what its C function returns; `status` methods
/// turn that into an [`Outcome`](crate::cuda::driver::Outcome) by the struct's own method `check(name, status)`.
macro_rules! library {
    (
        $(#[$doc:meta])* $name:ident {
            status { $(fn $method:ident = $symbol:literal($($argument:ident: $type:ty),* $(,)?);)* }
            other { $(fn $field:ident = $other:literal($($of:ty),*) -> $result:ty;)* }
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub(super) struct $name {
            $($method: unsafe extern "C" fn($($type),*) -> std::ffi::c_int,)*
            $($field: unsafe extern "C" fn($($of),*) -> $result,)*
        }

        #[expect(unsafe_code, reason = "functions of a library that the compiler does not see")]
        impl $name {
            /// Loads a library by its path, or by a name that the system looks for.
            pub(super) fn load(path: &std::path::Path) -> Result<Self, Absence> {
                // SAFETY: these libraries do nothing but set themselves up when they are loaded.
                let library = unsafe { libloading::Library::new(path) };
                let library = library.map_err(Absence::of)?;
                // Never unloaded: the vendor's libraries have threads and work at the process's end.
                let library = std::mem::ManuallyDrop::new(library);
                // SAFETY: the signatures are those of the library's header.
                unsafe {
                    Ok($name {
                        $($method: *library
                            .get(concat!($symbol, "\0").as_bytes())
                            .map_err(|_| Absence::Function($symbol))?,)*
                        $($field: *library
                            .get(concat!($other, "\0").as_bytes())
                            .map_err(|_| Absence::Function($other))?,)*
                    })
                }
            }

            $(
                /// # Safety
                /// The C function's.
                pub(super) unsafe fn $method(&self, $($argument: $type),*) -> crate::cuda::driver::Outcome {
                    // SAFETY: the caller's promise.
                    self.check($symbol, unsafe { (self.$method)($($argument),*) })
                }
            )*
        }
    };
}
pub(super) use library;
