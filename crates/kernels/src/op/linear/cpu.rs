//! The linear layer on the CPU: a matrix product, or rows of dot products where there are few tokens.

use super::few::Term;
use super::{Dims, Extra, Linear, check_term, dims};
use crate::buffer::FloatsMut;
use crate::cpu::gemm::{Output, View, bf16, gemm};
use crate::cpu::vector;
use crate::{Accum, Cpu, DType, Result, Tensor, shape};

/// Up to this many tokens a weight is read once, in place: packing it would cost more than the product.
pub(crate) const FEW_TOKENS: usize = 4;

/// The arithmetic of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Products {
    F32,
    Bf16,
}

impl Products {
    /// That of operands which are no weights.
    pub(crate) fn of(operands: &[&Tensor]) -> Self {
        match operands.iter().all(|operand| operand.dtype() == DType::Bf16) {
            true => Products::Bf16,
            false => Products::F32,
        }
    }
}

impl Linear for Cpu {
    fn linear(&self, x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()> {
        let op = "linear";
        let d = dims(op, ("x", x), ("w", w), ("y", y))?;
        let products = Products::of(&[x]);
        let (x, w, y) = (x.floats(op, "x")?, w.floats(op, "w")?, y.floats_mut(op, "y")?);
        if d.is_few() {
            self.linear_few(products, (d.t, d.n), &[Term { x, w, k: d.k }], alpha, None, accum, y);
        } else {
            let terms = [(View::rows(x, 0, d.t, d.k, d.k), View::rows(w, 0, d.n, d.k, d.k).transposed())];
            self.product(products, &terms, alpha, None, accum, y);
        }
        Ok(())
    }

    fn linear_fused(
        &self,
        x: &Tensor,
        w: &Tensor,
        extra: Extra<'_>,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_fused";
        let d = dims(op, ("x", x), ("w", w), ("y", y))?;
        let products = Products::of(&[x]);
        let thin = match extra.term {
            Some((h, b)) => {
                let r = check_term(op, x, h, b, ("N", d.n))?;
                Some((h.floats(op, "h")?, b.floats(op, "b")?, r))
            }
            None => None,
        };
        let mut space = Vec::new();
        let bias = match extra.bias {
            Some(bias) => {
                shape::expect(op, "bias", bias, &[("N", d.n)])?;
                Some(bias.floats(op, "bias")?.widened(&mut space))
            }
            None => None,
        };
        let (x, w, y) = (x.floats(op, "x")?, w.floats(op, "w")?, y.floats_mut(op, "y")?);
        if d.is_few() {
            let mut terms = vec![Term { x, w, k: d.k }];
            terms.extend(thin.map(|(h, b, r)| Term { x: h, w: b, k: r }));
            self.linear_few(products, (d.t, d.n), &terms, 1.0, bias, accum, y);
        } else {
            let of = |x, w, k| (View::rows(x, 0, d.t, k, k), View::rows(w, 0, d.n, k, k).transposed());
            let mut terms = vec![of(x, w, d.k)];
            terms.extend(thin.map(|(h, b, r)| of(h, b, r)));
            self.product(products, &terms, 1.0, bias, accum, y);
        }
        Ok(())
    }

    fn linear_input_gradient(
        &self,
        dy: &Tensor,
        w: &Tensor,
        alpha: f32,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_input_gradient";
        let d = dims(op, ("dx", dx), ("w", w), ("dy", dy))?;
        let products = Products::of(&[dy]);
        let dy = View::rows(dy.floats(op, "dy")?, 0, d.t, d.n, d.n);
        let w = View::rows(w.floats(op, "w")?, 0, d.n, d.k, d.k);
        self.product(products, &[(dy, w)], alpha, None, accum, dx.floats_mut(op, "dx")?);
        Ok(())
    }

    fn linear_input_gradient_fused(
        &self,
        dy: &Tensor,
        w: &Tensor,
        term: Option<(&Tensor, &Tensor)>,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_input_gradient_fused";
        let d = dims(op, ("dx", dx), ("w", w), ("dy", dy))?;
        let dy_view = View::rows(dy.floats(op, "dy")?, 0, d.t, d.n, d.n);
        let mut terms = vec![(dy_view, View::rows(w.floats(op, "w")?, 0, d.n, d.k, d.k))];
        if let Some((v, a)) = term {
            let r = check_term(op, dy, v, a, ("K", d.k))?;
            let a = View::rows(a.floats(op, "a")?, 0, r, d.k, d.k);
            terms.push((View::rows(v.floats(op, "v")?, 0, d.t, r, r), a));
        }
        self.product(Products::of(&[dy]), &terms, 1.0, None, accum, dx.floats_mut(op, "dx")?);
        Ok(())
    }

    fn linear_weight_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        alpha: f32,
        accum: Accum,
        dw: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_weight_gradient";
        let d = dims(op, ("x", x), ("dw", dw), ("dy", dy))?;
        let products = Products::of(&[dy, x]);
        let dy = View::rows(dy.floats(op, "dy")?, 0, d.t, d.n, d.n).transposed();
        let x = View::rows(x.floats(op, "x")?, 0, d.t, d.k, d.k);
        self.product(products, &[(dy, x)], alpha, None, accum, FloatsMut::F32(dw.f32_mut(op, "dw")?));
        Ok(())
    }
}

impl Cpu {
    /// `y (+)= alpha sum of a b + bias`; the terms' a `[T, *]`, b `[*, N]`, y `[T, N]`, bias `[N]`.
    pub(crate) fn product(
        &self,
        products: Products,
        terms: &[(View<'_>, View<'_>)],
        alpha: f32,
        bias: Option<&[f32]>,
        accum: Accum,
        y: FloatsMut<'_>,
    ) {
        let n = terms[0].1.columns;
        if products == Products::Bf16 {
            return bf16::gemm(&self.team, &self.recycler, terms, alpha, bias, accum, y);
        }
        let sum = |y: &mut [f32]| {
            for (index, &(a, b)) in terms.iter().enumerate() {
                let accum = if index == 0 { accum } else { Accum::Add };
                gemm(&self.team, &self.recycler, a, b, alpha, accum, Output::rows(y, n));
            }
            if let Some(bias) = bias {
                y.chunks_exact_mut(n).for_each(|y| vector::axpy(1.0, bias, y));
            }
        };
        match y {
            FloatsMut::F32(y) => sum(y),
            FloatsMut::Bf16(y) => {
                let mut space = self.recycler.take(y.len());
                let space = space.as_mut_slice();
                if accum == Accum::Add {
                    vector::widen(y, space);
                }
                sum(space);
                vector::narrow(space, y);
            }
        }
    }
}

impl Dims {
    /// Whether the product is one of few tokens.
    fn is_few(self) -> bool {
        (1..=FEW_TOKENS).contains(&self.t) && self.k > 0 && self.n > 0
    }
}
