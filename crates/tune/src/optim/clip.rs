//! Gradient clipping by the global norm.

use crate::{Result, Tuned};

/// The Euclidean norm of all gradients together, summed in the order of [`Tuned::visit`].
pub fn global_norm(tuned: &Tuned) -> Result<f64> {
    let squares = tuned.model.kernels().sums_of_squares(&tuned.gradients())?;
    Ok(squares.into_iter().sum::<f64>().sqrt())
}

/// What gradients of the given global norm are multiplied by so that it becomes at most `max_grad_norm`;
/// `torch.nn.utils.clip_grad_norm_` with its 1e-6. A maximum of 0 leaves them as they are.
///
/// The factor is handed to the optimizer's own pass over the gradients: there is none for the clipping.
pub fn clip_factor(norm: f64, max_grad_norm: f64) -> f64 {
    if max_grad_norm == 0.0 { 1.0 } else { (max_grad_norm / (norm + 1e-6)).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::clip_factor;

    #[test]
    fn only_large_gradients_are_scaled() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
        assert_eq!(clip_factor(1e9, 0.0), 1.0);
        assert_eq!(clip_factor(4.0, 1.0), 1.0 / 4.000001);
        assert!(clip_factor(4.0, 1.0) * 4.0 <= 1.0);
    }
}
