//! Full fine-tuning: every parameter of the model.
//!
//! Update: W itself, from W0; also biases, norms, embeddings and heads. There is no adapter and no start: the model
//! is loaded with weights that can be changed, and its gradients stand in [`adapter::full`](crate::adapter::full).
//!
//! Trained and stored: out in values of an `[out, in]` weight, and all other parameters.
