//! Laws of one adapted linear layer: each adapter's output is its formula in f64, and its gradients are the formula's
//! difference quotients, with and without dropout.

mod common;

use std::collections::BTreeMap;

use common::*;
use lora_sb_kernels::{Accum, DType, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Layer, Projection, Site};
use lora_sb_tune::adapter::dora::{Dora, DoraSite};
use lora_sb_tune::adapter::dropout::InputDropout;
use lora_sb_tune::adapter::latent::{Latent, LatentSite};
use lora_sb_tune::adapter::lora::{Gradients, Lora, LoraSite};
use lora_sb_tune::adapter::{Adapter, Part, Pass};
use nalgebra::DMatrix;

const SCALE: f64 = 0.75;
const SEED: u64 = 77;

/// What an adapter does, which several methods share: LoRA, rsLoRA and LoRA-Pro; PiSSA and LoRA-GA; DoRA; LoRA-SB
/// and LoRA-XS.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Product,
    Relative,
    Magnitude,
    Latent,
}

impl Form {
    fn parts(self) -> &'static [Part] {
        match self {
            Form::Product => &[Part::A, Part::B],
            Form::Relative => &[Part::A, Part::B, Part::StartA, Part::StartB],
            Form::Magnitude => &[Part::A, Part::B, Part::Magnitude],
            Form::Latent => &[Part::A, Part::B, Part::R],
        }
    }
}

/// One layer with one adapter on the host, in numbers that f32 holds exactly.
struct Case {
    form: Form,
    site: Site,
    rate: f64,
    /// `[N, K]`.
    weight: DMatrix<f64>,
    /// `[1, N]`.
    bias: Option<DMatrix<f64>>,
    parts: BTreeMap<Part, DMatrix<f64>>,
    /// `[T, K]`.
    x: DMatrix<f64>,
}

fn draw(generator: &mut Generator, rows: usize, columns: usize) -> DMatrix<f64> {
    let mut values = vec![0.0; rows * columns];
    generator.normal(1.0, &mut values);
    DMatrix::from_iterator(rows, columns, values.into_iter().map(f64::from))
}

fn upload(kernels: &dyn Kernels, matrix: &DMatrix<f64>, shape: &[usize]) -> Tensor {
    let values: Vec<f32> = matrix.transpose().iter().map(|&value| value as f32).collect();
    kernels.from_f32(&values, shape).unwrap()
}

fn download(kernels: &dyn Kernels, tensor: &Tensor, (rows, columns): (usize, usize)) -> DMatrix<f64> {
    let values = kernels.to_f32(tensor).unwrap();
    DMatrix::from_row_iterator(rows, columns, values.into_iter().map(f64::from))
}

impl Case {
    fn new(
        form: Form,
        (t, out, input, rank): (usize, usize, usize, usize),
        biased: bool,
        rate: f64,
        seed: u64,
    ) -> Case {
        let generator = &mut Generator::new(seed, Stream::Adapter, 5);
        let mut parts = BTreeMap::new();
        for &part in form.parts() {
            let shape = part.shape(rank, (out, input));
            let matrix = draw(generator, shape[0], shape.get(1).copied().unwrap_or(1));
            parts.insert(part, matrix);
        }
        Case {
            form,
            site: Projection::Up.of(3),
            rate,
            weight: draw(generator, out, input),
            bias: biased.then(|| draw(generator, 1, out)),
            parts,
            x: draw(generator, t, input),
        }
    }

    fn sizes(&self) -> (usize, usize, usize) {
        (self.x.nrows(), self.weight.nrows(), self.weight.ncols())
    }

    fn pass(&self) -> Pass {
        if self.rate > 0.0 { Pass::Training { seed: SEED } } else { Pass::Evaluation }
    }

    fn adapter(&self, kernels: &dyn Kernels) -> Box<dyn Adapter> {
        let (_, out, input) = self.sizes();
        let rank = self.parts[&Part::A].nrows();
        let part = |part: Part| upload(kernels, &self.parts[&part], &part.shape(rank, (out, input)));
        let (a, b) = (part(Part::A), part(Part::B));
        let scale = SCALE as f32;
        let mut adapter: Box<dyn Adapter> = match self.form {
            Form::Product => {
                let state = LoraSite::new(kernels, a, b).unwrap();
                Box::new(Lora::new(scale, self.rate, Gradients::Plain, [(self.site, state)].into()))
            }
            Form::Relative => {
                let start = (part(Part::StartA), part(Part::StartB));
                let state = LoraSite::relative(kernels, a, b, start).unwrap();
                Box::new(Lora::new(scale, self.rate, Gradients::Plain, [(self.site, state)].into()))
            }
            Form::Magnitude => {
                let weight = upload(kernels, &self.weight, &[out, input]);
                let state = DoraSite::new(kernels, &weight, a, b, part(Part::Magnitude)).unwrap();
                Box::new(Dora::new(scale, self.rate, [(self.site, state)].into()))
            }
            Form::Latent => {
                let state = LatentSite::new(a, b, part(Part::R));
                Box::new(Latent::new(kernels, scale, self.rate, [(self.site, state)].into()).unwrap())
            }
        };
        adapter.begin(self.pass());
        adapter
    }

    /// The mask over `1 - rate`, `[T, K]`.
    fn mask(&self, kernels: &dyn Kernels) -> DMatrix<f64> {
        let (t, _, input) = self.sizes();
        let ones = DMatrix::from_element(t, input, 1.0);
        let mut dropout = InputDropout::new(self.rate);
        dropout.begin(self.pass());
        match dropout.apply(kernels, self.site, &upload(kernels, &ones, &[t, input])).unwrap() {
            Some(mask) => download(kernels, &mask, (t, input)),
            None => ones,
        }
    }

    /// The norms of the rows of `W0 + s B A`.
    fn norms(&self) -> Vec<f64> {
        let moved = &self.weight + SCALE * &self.parts[&Part::B] * &self.parts[&Part::A];
        moved.row_iter().map(|row| row.norm()).collect()
    }

    /// The layer's output, with the norms of DoRA given: the gradient takes them for constants.
    fn output(
        &self,
        parts: &BTreeMap<Part, DMatrix<f64>>,
        x: &DMatrix<f64>,
        mask: &DMatrix<f64>,
        norms: &[f64],
    ) -> DMatrix<f64> {
        let mut y = x * self.weight.transpose();
        if let Some(bias) = &self.bias {
            y.row_iter_mut().for_each(|mut row| row += bias);
        }
        let seen = x.component_mul(mask);
        let (a, b) = (&parts[&Part::A], &parts[&Part::B]);
        match self.form {
            Form::Product => y + SCALE * seen * a.transpose() * b.transpose(),
            Form::Relative => {
                let start = x * parts[&Part::StartA].transpose() * parts[&Part::StartB].transpose();
                y + SCALE * (seen * a.transpose() * b.transpose() - start)
            }
            Form::Latent => y + SCALE * seen * a.transpose() * parts[&Part::R].transpose() * b.transpose(),
            Form::Magnitude => {
                let mut z = &seen * (&self.weight + SCALE * b * a).transpose();
                for (n, norm) in norms.iter().enumerate() {
                    z.column_mut(n).scale_mut(parts[&Part::Magnitude][n] / norm);
                }
                y + z - seen * self.weight.transpose()
            }
        }
    }
}

/// The slope of `f` along `direction` at `at`. The outputs are linear in each of their operands, so a step of 1 gives
/// it without error.
fn slope(at: &DMatrix<f64>, direction: &DMatrix<f64>, f: impl Fn(&DMatrix<f64>) -> f64) -> f64 {
    (f(&(at + direction)) - f(&(at - direction))) / 2.0
}

/// How the model hands a layer to the hook.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Alone,
    /// As the only layer that reads its input: the feed-forward layer of an encoder.
    GroupOfOne,
}

fn check(case: &Case, what: &str) {
    for entry in [Entry::Alone, Entry::GroupOfOne] {
        check_by(case, entry, &format!("{what}, {entry:?}"));
    }
}

fn check_by(case: &Case, entry: Entry, what: &str) {
    let kernels = device();
    let kernels = kernels.as_ref();
    let (t, out, input) = case.sizes();
    let mut adapter = case.adapter(kernels);
    let weight = upload(kernels, &case.weight, &[out, input]);
    let bias = case.bias.as_ref().map(|bias| upload(kernels, bias, &[out]));
    let layer = Layer { site: case.site, weight: &weight, bias: bias.as_ref() };
    let x = upload(kernels, &case.x, &[t, input]);
    let (mask, norms) = (case.mask(kernels), case.norms());
    let expected = case.output(&case.parts, &case.x, &mask, &norms);
    let tolerance = rounding(out * input) * expected.amax().max(1.0);
    let generator = &mut Generator::new(9, Stream::Adapter, 2);
    let stream = draw(generator, t, out);
    let mut saved = None;
    // Into a tensor of its own, and onto what a residual stream holds.
    for (accum, before) in [(Accum::Add, stream.clone()), (Accum::Replace, DMatrix::zeros(t, out))] {
        let mut y = upload(kernels, &stream, &[t, out]);
        saved = match entry {
            Entry::Alone => Some(adapter.forward(kernels, layer, &x, accum, &mut y).unwrap()),
            Entry::GroupOfOne => {
                adapter.forward_group(kernels, &[layer], &x, accum, &mut [&mut y]).unwrap().pop()
            }
        };
        let off = (download(kernels, &y, (t, out)) - before - &expected).amax();
        assert!(off <= tolerance, "{what}: {accum:?}: the output is off by {off:.2e} of {tolerance:.2e}");
    }
    let saved = saved.unwrap();

    let (dy, before) = (draw(generator, t, out), draw(generator, t, input));
    let dy_device = upload(kernels, &dy, &[t, out]);
    // What other layers have put there.
    let mut dx = upload(kernels, &before, &[t, input]);
    let x_again = adapter.needs_input(case.site).then_some(&x);
    let dx_out = Some((&mut dx, Accum::Add));
    match entry {
        Entry::Alone => adapter.backward(kernels, layer, saved, x_again, &dy_device, dx_out),
        Entry::GroupOfOne => {
            adapter.backward_group(kernels, &[layer], vec![saved], x_again, &[&dy_device], dx_out)
        }
    }
    .unwrap();

    let compare = |name: &str, gradient: &DMatrix<f64>, direction: &DMatrix<f64>, slope: f64| {
        let found = gradient.dot(direction);
        let tolerance = rounding(t * out * input) * gradient.norm() * direction.norm();
        assert!((found - slope).abs() <= tolerance, "{what}: {name}: slope {slope}, gradient {found}");
        assert!(slope.abs() > 10.0 * tolerance, "{what}: {name}: a slope of {slope} is no test");
    };
    let direction = draw(generator, t, input);
    let along_x = slope(&case.x, &direction, |x| dy.dot(&case.output(&case.parts, x, &mask, &norms)));
    compare("x", &(download(kernels, &dx, (t, input)) - before), &direction, along_x);

    let mut gradients = BTreeMap::new();
    let mut visitor = |_: Site, part: Part, value: &mut Tensor, gradient: &mut Tensor| {
        assert_eq!(value.shape(), gradient.shape());
        gradients.insert(part, kernels.to_f32(gradient)?);
        Ok(())
    };
    adapter.visit(&mut visitor).unwrap();
    let trained: &[Part] = match case.form {
        Form::Product | Form::Relative => &[Part::A, Part::B],
        Form::Magnitude => &[Part::A, Part::B, Part::Magnitude],
        Form::Latent => &[Part::R],
    };
    assert_eq!(gradients.keys().copied().collect::<Vec<_>>(), trained, "{what}");
    for (part, gradient) in gradients {
        let at = &case.parts[&part];
        let direction = draw(generator, at.nrows(), at.ncols());
        let along = slope(at, &direction, |value| {
            let mut parts = case.parts.clone();
            parts.insert(part, value.clone());
            dy.dot(&case.output(&parts, &case.x, &mask, &norms))
        });
        let gradient = gradient.into_iter().map(f64::from);
        let gradient = DMatrix::from_row_iterator(at.nrows(), at.ncols(), gradient);
        compare(part.name(), &gradient, &direction, along);
    }
}

const FORMS: [Form; 4] = [Form::Product, Form::Relative, Form::Magnitude, Form::Latent];

#[test]
fn law_outputs_and_gradients_are_those_of_the_formula() {
    for form in FORMS {
        for (seed, sizes) in [(1, (1, 5, 3, 2)), (2, (7, 13, 11, 3)), (3, (2, 1, 17, 1)), (4, (5, 37, 29, 8))]
        {
            for biased in [false, true] {
                for rate in [0.0, 0.3] {
                    let what = format!("{form:?} {sizes:?} biased={biased} dropout={rate}");
                    check(&Case::new(form, sizes, biased, rate, seed), &what);
                }
            }
        }
    }
}

/// Everything that a layer computes of x `[T, K]` and dy `[T, N]`, in a type: y, dx, and the gradients by part.
fn computed(case: &Case, kernels: &dyn Kernels, dtype: DType) -> Vec<(String, Vec<f32>)> {
    let (t, out, input) = case.sizes();
    let mut adapter = case.adapter(kernels);
    let weight = upload(kernels, &case.weight, &[out, input]);
    let bias = case.bias.as_ref().map(|bias| upload(kernels, bias, &[out]));
    let layer = Layer { site: case.site, weight: &weight, bias: bias.as_ref() };
    let operand = |matrix: &DMatrix<f64>, shape: &[usize]| {
        let mut operand = kernels.empty_of(dtype, shape).unwrap();
        kernels.cast(&upload(kernels, matrix, shape), &mut operand).unwrap();
        operand
    };
    let dy = draw(&mut Generator::new(9, Stream::Adapter, 2), t, out);
    let (x, dy) = (operand(&case.x, &[t, input]), operand(&dy, &[t, out]));
    let (mut y, mut dx) = (kernels.empty(&[t, out]).unwrap(), kernels.empty(&[t, input]).unwrap());
    let saved = adapter.forward(kernels, layer, &x, Accum::Replace, &mut y).unwrap();
    let again = adapter.needs_input(case.site).then_some(&x);
    adapter.backward(kernels, layer, saved, again, &dy, Some((&mut dx, Accum::Replace))).unwrap();
    let mut all = vec![("y".to_string(), kernels.to_f32(&y).unwrap())];
    all.push(("dx".to_string(), kernels.to_f32(&dx).unwrap()));
    let mut visitor = |_: Site, part: Part, _: &mut Tensor, gradient: &mut Tensor| {
        all.push((part.name().to_string(), kernels.to_f32(gradient)?));
        Ok(())
    };
    adapter.visit(&mut visitor).unwrap();
    all
}

#[test]
fn law_in_bf16_all_is_what_it_is_in_f32_but_for_the_rounding_of_operands() {
    let kernels = device();
    let kernels = kernels.as_ref();
    // Operands: x or dy, A, B, R or its gradient's, W0, and what is made of x and dy on the way; each rounded by 2^-9 of
    // itself in the mean, all independently. Twice that is the largest of many.
    let tolerance = 2.0 * 8f64.sqrt() / 512.0;
    for form in FORMS {
        for rate in [0.0, 0.3] {
            let case = Case::new(form, (19, 37, 29, 8), true, rate, 5);
            let all = computed(&case, kernels, DType::F32).into_iter();
            for ((name, exact), (_, rounded)) in all.zip(computed(&case, kernels, DType::Bf16)) {
                let off = distance(&exact, &rounded);
                let most = tolerance * largest(&exact);
                assert!(off <= most, "{form:?}, dropout={rate}: {name} is off by {off:.2e} of {most:.2e}");
                assert!(off > 0.0, "{form:?}, dropout={rate}: {name} is not rounded");
            }
        }
    }
}

#[test]
fn law_what_is_merged_is_what_is_computed() {
    let kernels = device();
    let kernels = kernels.as_ref();
    for form in FORMS {
        let case = Case::new(form, (6, 13, 11, 3), true, 0.0, 6);
        let adapter = case.adapter(kernels);
        let weight = upload(kernels, &case.weight, &[13, 11]);
        let delta = adapter.delta(kernels, case.site, &weight).unwrap().unwrap();
        let merged = &case.weight + download(kernels, &delta, (13, 11));
        let mut expected = case.output(&case.parts, &case.x, &case.mask(kernels), &case.norms());
        expected.row_iter_mut().for_each(|mut row| row -= case.bias.as_ref().unwrap());
        let off = (&case.x * merged.transpose() - &expected).amax();
        assert!(off <= rounding(13 * 11) * expected.amax(), "{form:?}: {off:.2e}");

        // The plain LoRA that others load, with a magnitude where there is one.
        let factors = adapter.fold(kernels, case.site).unwrap().unwrap();
        let rank = if form == Form::Relative { 6 } else { 3 };
        assert_eq!((factors.a.shape(), factors.b.shape()), ([rank, 11].as_slice(), [13, rank].as_slice()));
        let product = download(kernels, &factors.b, (13, rank)) * download(kernels, &factors.a, (rank, 11));
        let mut folded = &case.weight + product;
        assert_eq!(factors.magnitude.is_some(), form == Form::Magnitude);
        if let Some(magnitude) = &factors.magnitude {
            let magnitude = kernels.to_f32(magnitude).unwrap();
            for (mut row, m) in folded.row_iter_mut().zip(magnitude) {
                let norm = row.norm();
                row.scale_mut(f64::from(m) / norm);
            }
        }
        let off = (&case.x * folded.transpose() - &expected).amax();
        assert!(off <= rounding(13 * 11) * expected.amax(), "{form:?} folded: {off:.2e}");
    }
}

#[test]
fn law_dora_follows_what_the_optimizer_changes() {
    let kernels = device();
    let kernels = kernels.as_ref();
    let mut case = Case::new(Form::Magnitude, (3, 7, 5, 2), false, 0.0, 8);
    let mut adapter = case.adapter(kernels);
    let weight = upload(kernels, &case.weight, &[7, 5]);
    let layer = Layer { site: case.site, weight: &weight, bias: None };
    let x = upload(kernels, &case.x, &[3, 5]);
    let output = |adapter: &dyn Adapter| {
        let mut y = kernels.empty(&[3, 7]).unwrap();
        adapter.forward(kernels, layer, &x, Accum::Replace, &mut y).unwrap();
        download(kernels, &y, (3, 7))
    };
    let before = output(&*adapter);
    adapter.visit(&mut |_, _, value, _| Ok(kernels.scale(0.5, value)?)).unwrap();
    case.parts.values_mut().for_each(|part| *part *= 0.5);
    let after = output(&*adapter);
    let expected = case.output(&case.parts, &case.x, &case.mask(kernels), &case.norms());
    assert!((&after - &expected).amax() <= rounding(35) * expected.amax());
    assert!((after - before).amax() > 0.1);
}
