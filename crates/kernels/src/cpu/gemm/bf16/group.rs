//! Products that are done together: results of the same operands, each packed once.

use std::sync::Arc;

use super::latent::{Factors, GRADIENT_ROWS, Latent, SquareGradient, square_gradient};
use super::micro::Micro;
use super::rows::{OpenRows, PackedRows};
use super::sum::{Rows, Sum, Tasks};
use super::{SERIAL_BELOW, TASKS, chunk_rows};
use crate::Accum;
use crate::buffer::{FloatsMut, Recycler};
use crate::cpu::gemm::pack::View;
use crate::cpu::gemm::{Output, SharedRows};
use crate::cpu::team::Team;

/// What the A of a term is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// An operand of the group.
    Operand(usize),
    /// h of a latent part of the group.
    Latent(usize),
}

/// `C (+)= alpha sum of A B + bias`.
pub(crate) struct Target<'a> {
    /// A `[M, *]` and B `[*, N]` of each product.
    pub(crate) terms: Vec<(Source, View<'a>)>,
    pub(crate) alpha: f32,
    /// `[N]`.
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) accum: Accum,
    /// `[M, N]`.
    pub(crate) c: FloatsMut<'a>,
}

/// Operands `[M, *]`, and what is made of them.
pub(crate) struct Group<'a> {
    pub(crate) operands: Vec<View<'a>>,
    pub(crate) latents: Vec<Latent<'a>>,
    pub(crate) targets: Vec<Target<'a>>,
}

/// What products are computed with.
#[derive(Clone, Copy)]
struct Machine<'a> {
    micro: Micro,
    team: &'a Team,
    recycler: &'a Arc<Recycler>,
    /// Whether the work is too little to wake others for.
    serial: bool,
}

impl Machine<'_> {
    fn each(self, count: usize, work: impl Fn(usize) + Send + Sync) {
        if self.serial { (0..count).for_each(work) } else { self.team.each(count, work) }
    }
}

impl Group<'_> {
    pub(crate) fn compute(self, team: &Team, recycler: &Arc<Recycler>) {
        self.run(Micro::detect(), team, recycler);
    }

    pub(super) fn run(mut self, micro: Micro, team: &Team, recycler: &Arc<Recycler>) {
        let m = self.check();
        if m == 0 {
            return;
        }
        let serial = self.multiplications() < SERIAL_BELOW || team.threads() == 1;
        let machine = Machine { micro, team, recycler, serial };
        let mut factors: Vec<Factors> =
            self.latents.iter().map(|latent| latent.room(recycler, micro)).collect();
        let targets: Vec<_> = std::mem::take(&mut self.targets).into_iter().map(Open::of).collect();
        let chunk = chunk_rows(micro, m);
        for first in (0..m).step_by(chunk) {
            let rows = first..m.min(first + chunk);
            let views: Vec<View<'_>> =
                self.operands.iter().map(|view| view.some_rows(rows.start, rows.len())).collect();
            let operands = self.pack(machine, &views, &mut factors, first == 0);
            let thin = self.thin(machine, (first, rows.len()), &operands, &factors, &targets);
            self.multiply(machine, (first, rows.len()), &operands, &thin, &targets);
        }
    }

    /// Checks that sizes fit; M.
    fn check(&self) -> usize {
        let m = self.operands.first().map_or(0, |operand| operand.rows);
        assert!(
            self.operands.iter().all(|operand| operand.rows == m),
            "products: all operands have M={m} rows"
        );
        for latent in &self.latents {
            let (operand, r) = (&self.operands[latent.operand], latent.rank());
            assert_eq!(
                operand.columns, latent.factor.rows,
                "products: F has as many rows as its operand columns"
            );
            assert_eq!(latent.u.len(), m * r, "products: u is [M={m}, r={r}]");
            if let Some(SquareGradient { other, gradient, .. }) = &latent.gradient {
                assert_eq!((other.len(), gradient.len()), (m * r, r * r), "products: the operands of dM");
            }
        }
        for Target { terms, bias, c, .. } in &self.targets {
            let n = terms[0].1.columns;
            for (source, b) in terms {
                let depth = match *source {
                    Source::Operand(index) => self.operands[index].columns,
                    Source::Latent(index) => self.latents[index].rank(),
                };
                assert_eq!((b.rows, b.columns), (depth, n), "products: a term's B is [K={depth}, N={n}]");
            }
            assert!(bias.is_none_or(|bias| bias.len() == n), "products: the bias has N={n} elements");
            assert!(c.len() >= m * n, "products: C is too small for M={m}, N={n}");
        }
        m
    }

    fn multiplications(&self) -> usize {
        let m = self.operands[0].rows;
        let of_target =
            |target: &Target<'_>| -> usize { target.terms.iter().map(|(_, b)| m * b.rows * b.columns).sum() };
        let of_latent = |latent: &Latent<'_>| m * latent.rank() * (latent.factor.rows + latent.rank());
        self.targets.iter().map(of_target).sum::<usize>() + self.latents.iter().map(of_latent).sum::<usize>()
    }

    /// The operands' rows in panels; with the first of them, the factors.
    #[expect(unsafe_code, reason = "panels are packed by several tasks")]
    fn pack(
        &self,
        machine: Machine<'_>,
        views: &[View<'_>],
        factors: &mut [Factors],
        with_factors: bool,
    ) -> Vec<PackedRows> {
        let room =
            |view: &View<'_>| PackedRows::room(machine.recycler, machine.micro, view.rows, view.columns);
        let mut packed: Vec<PackedRows> = views.iter().map(room).collect();
        let panels = packed.first().map_or(0, PackedRows::panels);
        let open: Vec<OpenRows<'_>> = packed.iter_mut().map(PackedRows::open).collect();
        let open_factors: Vec<_> = factors.iter_mut().map(Factors::open).collect();
        let first = if with_factors { self.latents.len() } else { 0 };
        machine.each(first + panels * views.len(), |task| match task.checked_sub(first) {
            // SAFETY: each factor is one task's.
            None => unsafe { open_factors[task].fill(machine.micro, &self.latents[task]) },
            // SAFETY: each panel is one task's.
            Some(task) => unsafe { open[task / panels].pack(&views[task / panels], task % panels) },
        });
        drop(open);
        packed
    }

    /// u of every latent part, and h of those that a target reads.
    #[expect(unsafe_code, reason = "panels are written by several tasks")]
    fn thin(
        &mut self,
        machine: Machine<'_>,
        (first, rows): (usize, usize),
        operands: &[PackedRows],
        factors: &[Factors],
        targets: &[Open<'_>],
    ) -> Vec<Option<PackedRows>> {
        let read = |index: usize| targets.iter().any(|target| target.reads(Source::Latent(index)));
        let room = |(index, latent): (usize, &Latent<'_>)| {
            read(index).then(|| PackedRows::room(machine.recycler, machine.micro, rows, latent.rank()))
        };
        let mut thin: Vec<Option<PackedRows>> = self.latents.iter().enumerate().map(room).collect();
        let count = self.latents.len();
        if count == 0 {
            return thin;
        }
        let open: Vec<Option<OpenRows<'_>>> =
            thin.iter_mut().map(|rows| rows.as_mut().map(PackedRows::open)).collect();
        let parts: Vec<(usize, f32)> =
            self.latents.iter().map(|latent| (latent.operand, latent.scale)).collect();
        let us: Vec<SharedRows<'_, f32>> = self
            .latents
            .iter_mut()
            .map(|latent| {
                let r = latent.rank();
                Output::rows(&mut latent.u[first * r..(first + rows) * r], r.max(1)).share()
            })
            .collect();
        machine.each(count * operands[0].panels(), |task| {
            let (panel, index) = (task / count, task % count);
            let (operand, scale) = parts[index];
            // SAFETY: each pair of a latent part and a panel is one task's.
            unsafe {
                factors[index].panel(
                    machine.micro,
                    scale,
                    &operands[operand],
                    panel,
                    &us[index],
                    open[index].as_ref(),
                );
            }
        });
        drop(open);
        thin
    }

    /// The targets' rows, and what the same rows add to the gradients of the latent parts.
    #[expect(unsafe_code, reason = "rows of a gradient are written by several tasks")]
    fn multiply(
        &mut self,
        machine: Machine<'_>,
        (first_row, rows): (usize, usize),
        operands: &[PackedRows],
        thin: &[Option<PackedRows>],
        targets: &[Open<'_>],
    ) {
        let sums: Vec<Sum<'_>> =
            targets.iter().map(|target| target.sum((first_row, rows), operands, thin)).collect();
        let at_least = TASKS.div_ceil(sums.len().max(1));
        let tasks: Vec<Tasks> = sums.iter().map(|sum| sum.tasks(machine.micro, at_least)).collect();
        let gradients: Vec<Gradient<'_>> =
            self.latents.iter_mut().filter_map(|latent| Gradient::of(latent, (first_row, rows))).collect();
        let mut work: Vec<(Work, usize)> = Vec::new();
        for (index, tasks) in tasks.iter().enumerate() {
            work.extend((0..tasks.count()).map(|task| (Work::Sum(index), task)));
        }
        for (index, gradient) in gradients.iter().enumerate() {
            work.extend((0..gradient.rank.div_ceil(GRADIENT_ROWS)).map(|task| (Work::Gradient(index), task)));
        }
        machine.each(work.len(), |at| match work[at] {
            (Work::Sum(index), task) => {
                sums[index].run(machine.micro, &tasks[index], task, machine.recycler);
            }
            // SAFETY: each block of rows is one task's.
            (Work::Gradient(index), task) => unsafe { gradients[index].run(task) },
        });
    }
}

/// The rows `view [M, K]` in panels, for products that read them one after another.
pub(crate) fn pack_rows(team: &Team, recycler: &Arc<Recycler>, view: View<'_>) -> PackedRows {
    let micro = Micro::detect();
    let serial = view.rows * view.columns < SERIAL_BELOW / 64 || team.threads() == 1;
    let group = Group { operands: vec![view], latents: Vec::new(), targets: Vec::new() };
    let mut packed = group.pack(Machine { micro, team, recycler, serial }, &[view], &mut [], false);
    packed.swap_remove(0)
}

impl PackedRows {
    /// `C (+)= A B`; B `[K, N]`, c `[M, N]`.
    pub(crate) fn times(
        &self,
        team: &Team,
        recycler: &Arc<Recycler>,
        b: View<'_>,
        accum: Accum,
        c: FloatsMut<'_>,
    ) {
        let micro = Micro::detect();
        let multiplications = 2 * self.pairs * self.rows * b.columns;
        let serial = multiplications < SERIAL_BELOW || team.threads() == 1;
        assert_eq!(b.rows.div_ceil(2), self.pairs, "products: B has as many rows as the packed A columns");
        assert!(c.len() >= self.rows * b.columns, "products: C is too small");
        let c = Rows::of(c, b.columns);
        let sum = Sum {
            terms: vec![(self, b)],
            first_row: 0,
            rows: self.rows,
            columns: b.columns,
            alpha: 1.0,
            bias: None,
            accum,
            c: &c,
        };
        let tasks = sum.tasks(micro, TASKS);
        Machine { micro, team, recycler, serial }
            .each(tasks.count(), |task| sum.run(micro, &tasks, task, recycler));
    }
}

/// What a task of [`Group::multiply`] belongs to.
#[derive(Clone, Copy)]
enum Work {
    Sum(usize),
    Gradient(usize),
}

/// A target whose result several tasks write.
struct Open<'a> {
    terms: Vec<(Source, View<'a>)>,
    alpha: f32,
    bias: Option<&'a [f32]>,
    accum: Accum,
    columns: usize,
    c: Rows<'a>,
}

impl<'a> Open<'a> {
    fn of(target: Target<'a>) -> Self {
        let Target { terms, alpha, bias, accum, c } = target;
        let columns = terms[0].1.columns;
        Open { terms, alpha, bias, accum, columns, c: Rows::of(c, columns) }
    }

    fn reads(&self, source: Source) -> bool {
        self.terms.iter().any(|(read, _)| *read == source)
    }

    fn sum<'s>(
        &'s self,
        (first_row, rows): (usize, usize),
        operands: &'s [PackedRows],
        thin: &'s [Option<PackedRows>],
    ) -> Sum<'s> {
        let packed = |source: Source| match source {
            Source::Operand(index) => Some(&operands[index]),
            Source::Latent(index) => thin[index].as_ref(),
        };
        let terms = self.terms.iter().filter_map(|(source, b)| Some((packed(*source)?, *b))).collect();
        let Open { alpha, bias, accum, columns, ref c, .. } = *self;
        Sum { terms, first_row, rows, columns, alpha, bias, accum, c }
    }
}

/// Rows of a latent part that add to its gradient.
struct Gradient<'a> {
    /// `[rows, r]`, as `other`.
    u: &'a [f32],
    other: &'a [f32],
    scale: f32,
    rank: usize,
    /// `[r, r]`.
    out: SharedRows<'a, f32>,
}

impl<'a> Gradient<'a> {
    fn of<'l: 'a>(latent: &'a mut Latent<'l>, (first, rows): (usize, usize)) -> Option<Self> {
        let rank = latent.rank();
        let SquareGradient { other, scale, gradient } = latent.gradient.as_mut()?;
        let part = first * rank..(first + rows) * rank;
        let out = Output::rows(gradient, rank.max(1)).share();
        Some(Gradient { u: &latent.u[part.clone()], other: &other[part], scale: *scale, rank, out })
    }

    /// # Safety
    /// No other task may have these rows at the time.
    #[expect(unsafe_code, reason = "writes rows that its caller promises to be its own")]
    unsafe fn run(&self, task: usize) {
        let rows = task * GRADIENT_ROWS..self.rank.min((task + 1) * GRADIENT_ROWS);
        // SAFETY: promised by the caller.
        let out = unsafe { self.out.slice(rows.start * self.rank, rows.len() * self.rank) };
        square_gradient(self.u, self.other, self.rank, rows, self.scale, out);
    }
}
