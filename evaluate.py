"""Measure a model (a) on held-out questions, next to the model that it was trained from (b).

    python evaluate.py --model runs/dpo                       # on the data set that it learned from
    python evaluate.py --model runs/dpo --dataset tldr --reward runs/reward --text-metrics
    python evaluate.py --model runs/dpo --dataset tldr --baseline chosen \\
        --judge http://localhost:8000/v1 --judge-model NAME
    python evaluate.py --model runs/sft --dataset tldr --reward runs/reward \\
        --best-of 16 --temperature 1
    python evaluate.py --model runs/dpo --export mt_bench --prompts question.jsonl --output a.jsonl

Without --dataset, the data set, the reward and the lengths are those of the run that saved the
model (or else of the run that saved --reward).

    reward           of the answers, by --reward
    win_rate         share of questions where a's answer has the higher reward (a tie counts 1/2);
                     length_controlled: at equal length (evaluation/estimates.py)
    judge            the same by a language model (evaluation/judge.py), at the lowest --temperature
    kl, entropy      log a(y|x) - log b(y|x) and -log a(y|x) of samples from a at temperature 1
    length, ended    tokens, end-of-sequence included; share of answers that have one
    ranking          share of held-out pairs where the chosen response has the higher log-prob: its
                     sum, its mean, or reference_normalised: the implicit reward log a - log b.
                     margin: the mean difference of implicit rewards
    chrf, ...        chrF, BLEU and ROUGE-L against the data set's responses (--text-metrics)

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13, transformers 5.23.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import safe_open

import common
from data.models import model_folder, resolve_model
from evaluation import estimates, exports, questions, scores, text_metrics
from evaluation.estimates import Answers, add_wins, means
from evaluation.judge import Judge
from sampling.generate import generate, text_of
from sampling.rewards import load_reward
from sampling.show import end_of, show
from sampling.stored import prompt_text
from training.parallel import stop
from training.record import follow, run_of
from training.run_folder import flag, git_commit, package_version


@dataclass
class Args:
    model: str = "tiny"  # a: a folder (runs/dpo), a short name (gemma-2-2b), or a Hugging Face id
    baseline: str | None = None  # b: a model, none, or chosen (the responses); default: a's start
    dataset: str | None = None  # its held-out rows are used; default: as in a's own run
    eval_dataset: str | None = None  # held-out rows; default: as in a's own run
    columns: str | None = None  # rename columns of the rows: prompt=question,chosen=good
    chat_template: Literal["auto", "none"] = "auto"  # auto: texts become chat turns if there is one
    prompts: int | str = 1024  # at most this many questions, and pairs; of --export a file
    skip_bad_rows: bool = False  # leave out rows that cannot be used, instead of stopping
    max_length: int = 2048  # tokens of prompt and response together
    max_prompt_length: int = 1024  # a longer prompt loses its beginning
    temperature: tuple[float, ...] = (1.0, 0.0)  # one set of answers for each; 0: greedy
    max_new_tokens: int = 128  # per answer; of --export 1024
    top_k: int = 0  # draw from the k most likely tokens only; 0: from all
    best_of: int = 1  # draw N answers with a, keep the one with the highest --select-by
    select_by: str | None = None  # the reward of --best-of; default: --reward
    seed: int = 1  # of a's samples; b's have the next one
    batch_size: int = 256  # sequences per process
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # default: bfloat16 on GPUs
    cache_dir: str | None = None  # for the judge's replies; default: runs/.cache
    reward: str | None = None  # a reward model, a@b, family, or file.py:function
    measure: tuple[str, ...] = ()  # more rewards of the answers to report, as in --reward
    text_metrics: bool = False  # needs sacrebleu and rouge-score
    bleu_tokenize: str = "13a"  # sacrebleu's tokenizer: zh, ja-mecab, ... for those languages
    judge: str | None = None  # http://host:8000/v1; key: PLAINPREF_JUDGE_KEY or OPENAI_API_KEY
    judge_model: str | None = None  # the judge's name there
    judge_template: str = "dialogue"  # tldr, dialogue, translation, or a file like these
    judge_max_tokens: int = 1024  # per reply; a judge that thinks aloud needs more
    checkpoints: bool = False  # also measure each checkpoint in the model's folder
    show: int = 3  # print the answers to this many questions, at the lowest --temperature
    json: str | None = None  # file for all numbers
    markdown: str | None = None  # file for the table
    export: str | None = None  # rows: for sft.py; for other tools: alpaca_eval, mt_bench, lines
    output: str | None = None  # where --export writes a's answers
    scores: tuple[str, ...] = ()  # only show what such tools wrote about --model; added to --json


TINY = dict(dataset="family", max_length=176, max_prompt_length=160, max_new_tokens=16)


def complete(args: Args) -> None:
    """Fill in defaults that depend on other arguments. Refuse what cannot work."""
    resolve_model(args.model)  # refuses a folder that is not there
    run = run_of(args.model)
    source = args.model if run else args.reward
    if taken := follow(args, run_of(source)):
        text = ", ".join(f"{flag(name)} {value}" for name, value in taken.items())
        common.say("data", f"as in the run {source}: {text}")
    if args.dataset is None:
        where = f"a file, a short name or a hub id ({args.model} is not the folder of a run)"
        raise common.UserError(f"--dataset is needed: {where}")
    if args.eval_dataset is None and run.get("dataset") == args.dataset:
        args.eval_dataset = run.get("eval_dataset")  # otherwise the run learned from all rows
    if args.baseline is None:
        args.baseline = run.get("model", "none")
    if args.reward is None and args.dataset.split(":")[0] == "family":
        args.reward = "family"
    room, by = args.max_length - args.max_prompt_length, args.select_by or args.reward
    compares = args.judge_model and args.baseline != "none"
    wrong = {
        "--max-length must hold prompt and answer": not 1 <= args.max_new_tokens <= room,
        "--temperature must be 0 or more": min(args.temperature, default=-1) < 0,
        "--best-of must be 1 to --batch-size": not 1 <= args.best_of <= args.batch_size,
        "--best-of needs --reward or --select-by": args.best_of > 1 and not by,
        "--best-of needs --temperature above 0": args.best_of > 1 and 0 in args.temperature,
        "--judge needs --judge-model and a --baseline": args.judge and not compares,
        "--checkpoints: there are none": args.checkpoints and not checkpoints_of(args.model),
        "--export and --output FILE belong together": bool(args.export) != bool(args.output),
        f"--prompts {args.prompts}: a file is for --export": isinstance(args.prompts, str),
    }
    for file in filter(None, (args.json, args.markdown, args.output)):
        wrong[f"{file}: there is no such folder"] = not Path(file).expanduser().parent.is_dir()
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise common.UserError(message)
    if args.text_metrics:
        text_metrics.load_metrics(args.bleu_tokenize)


def checkpoints_of(model: str) -> dict[int, Path]:
    """Weights by step."""
    files = model_folder(model).glob("checkpoint-*/state.safetensors")
    return dict(sorted((int(f.parent.name.removeprefix("checkpoint-")), f) for f in files))


def main(args: Args) -> dict | None:
    if args.scores:
        return report(args, f"a: {args.model}", *scores.collect(args))
    if args.export not in (None, "rows"):
        return exports.export(args)
    complete(args)
    if args.judge:
        how = (args.judge_template, Path(args.cache_dir or "runs/.cache") / "verdicts.jsonl")
        judge = Judge(args.judge, args.judge_model, *how, args.judge_max_tokens)
    run = common.Processes()
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    has_b = args.baseline not in ("none", "chosen")
    if has_b:
        theirs = common.load_tokenizer(resolve_model(args.baseline, "--baseline"))
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise common.UserError(f"--baseline {args.baseline} has another tokenizer than --model")
    with_responses = args.baseline == "chosen" or args.text_metrics
    prompts, responses = questions.load_questions(args, tokenizer, with_responses)
    pairs = questions.load_pairs(args, tokenizer)
    chooser = (args.select_by or args.reward) if args.best_of > 1 else None
    names = dict.fromkeys((args.reward, chooser, *args.measure))
    rewards = {name: load_reward(name, tokenizer, args, run) for name in names if name}
    a = common.load_policy(args, run, args.model, name="a", frozen=True)
    b = common.load_policy(args, run, args.baseline, name="b", frozen=True) if has_b else None

    def answer(policy, temperature: float, seed: int, samples=1, n=None) -> list[np.ndarray]:
        """`samples` answers to each of the first n prompts, prompt by prompt."""
        return generate(
            policy, prompts[:n], tokenizer.stop_ids, args.max_new_tokens, temperature, seed, run,
            args.batch_size, f"answers, temperature {temperature:g}", samples, args.top_k,
        )  # fmt: skip

    def logps_of(policy: common.Policy, rows: list[common.Row]) -> np.ndarray:  # (N, K)
        size = max(1, args.batch_size // (4 * len(rows[0].responses)))
        parts = common.micro_batches([row.tokens() for row in rows], range(len(rows)), size)
        return common.compute_logps(policy, rows, parts, run, "log-probs").numpy()

    def rows_of(ids: list[np.ndarray]) -> list[common.Row]:
        return [common.Row(x, [y], x) for x, y in zip(prompts, ids, strict=False)]

    def texts_of(ids: list[np.ndarray]) -> list[str]:
        return [text_of(y, tokenizer).strip() for y in ids]

    def scored(ids: list[np.ndarray]) -> Answers:
        return Answers(ids, rewards[args.reward](prompts, ids).numpy() if args.reward else None)

    table, facts = {}, {"questions": len(prompts), "pairs": len(pairs)}
    for temperature in args.temperature:
        mode = {0.0: "greedy", 1.0: "sampled"}.get(temperature, f"sampled at {temperature:g}")
        made = answer(a, temperature, args.seed, args.best_of)
        if chooser:
            repeated = [prompt for prompt in prompts for _ in range(args.best_of)]
            best = rewards[chooser](repeated, made).view(-1, args.best_of).argmax(1)
            made = [made[i * args.best_of + k] for i, k in enumerate(best)]
        if args.export and temperature == args.temperature[0]:
            export(args, prompts, made, tokenizer)
        others = answer(b, temperature, args.seed + 1) if has_b else responses
        ours, theirs = scored(made), None if args.baseline == "none" else scored(others)
        estimates.compare_answers(table, mode, ours, theirs, tokenizer.stop_ids)
        for name in args.measure:
            sides = [made, others] if theirs else [made]
            values = [rewards[name](prompts, ids).numpy() for ids in sides]
            table[f"{mode}/{estimates.measure_name(name)}"] = means(*values)
        if temperature == min(args.temperature) and common.MAIN_PROCESS:
            for i, prompt in enumerate(prompts[: args.show]):
                question = end_of(prompt_text(prompt, tokenizer))
                print(f"\nquestion {i + 1}, answers {mode}: {question}")
                sides = [(args.model, ours), (args.baseline, theirs)][: 1 + bool(theirs)]
                show([(name, x.note(i), text_of(x.ids[i], tokenizer)) for name, x in sides])
        if temperature == 1 and not chooser:  # else these are samples of another distribution
            logps = logps_of(a, rows_of(made))[:, 0]
            if has_b:
                table[f"{mode}/kl"] = means(logps - logps_of(b, rows_of(made))[:, 0])
            table[f"{mode}/entropy"] = means(-logps)
        if args.text_metrics:
            sides = [texts_of(ids) for ids in ([made, others] if has_b else [made])]
            how = (texts_of(responses), args.bleu_tokenize)
            facts["signatures"] = text_metrics.compare_texts(table, mode, sides, *how)
        if args.judge and temperature == min(args.temperature):
            texts = [prompt_text(x, tokenizer) for x in prompts], texts_of(made), texts_of(others)
            verdicts = common.from_main(lambda texts=texts: judge.compare(*texts))
            wins = np.array([np.nan if x is None else x for x in verdicts["outcomes"]])
            add_wins(table, f"{mode}/judge", wins, ours, theirs)
            facts["judge"] = verdicts["facts"]
    if pairs:
        base_logps = logps_of(b, pairs) if has_b else None
        estimates.compare_rankings(table, pairs, logps_of(a, pairs), base_logps)

    curve = []
    for step, file in checkpoints_of(args.model).items() if args.checkpoints else ():
        with safe_open(file, "pt") as saved:
            of_ppo = any(key.startswith("weight|policy.") for key in saved.keys())
            for name, p in a.named_parameters():
                p.copy_(saved.get_tensor(f"weight|{'policy.' * of_ppo}{name}"))
        made = answer(a, 1.0, args.seed, n=256)
        point = {"step": step, "length": float(np.mean([len(ids) for ids in made]))}
        if args.reward:
            point["reward"] = float(rewards[args.reward](prompts[:256], made).mean())
        if has_b:
            point["kl"] = float((logps_of(a, rows_of(made)) - logps_of(b, rows_of(made))).mean())
        curve.append(point)

    versions = {name: package_version(name) for name in ("torch", "transformers", "numpy")}
    facts |= {"commit": git_commit(), "versions": versions}
    record = {"arguments": asdict(args), **estimates.as_json(table)}
    record |= {"curve": curve, "facts": facts}
    title = f"a: {args.model}; b: {args.baseline}; {len(prompts):,} questions of "
    title += f"{args.dataset}; reward: {args.reward}"
    return report(args, title, table, record) if common.MAIN_PROCESS else record


def export(args: Args, prompts: list, answers: list, tokenizer) -> None:
    """Write prompt/completion rows, without answers that are empty or have no end: a model that
    learned from a cut answer would stop there. A chat template's end stays in the text.
    """
    lines = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if int(answer[-1]) in tokenizer.stop_ids and text_of(answer, tokenizer).strip():
            text = tokenizer.decode([i for i in answer.tolist() if i != tokenizer.eos_token_id])
            row = {"prompt": prompt_text(prompt, tokenizer), "completion": text}
            lines.append(json.dumps(row) + "\n")
    if common.MAIN_PROCESS:
        Path(args.output).expanduser().write_text("".join(lines), encoding="utf-8")
    common.say("export", f"{len(lines):,} of {len(prompts):,} answers; others are cut or empty")


def report(args: Args, title: str, table: estimates.Table, record: dict) -> dict:
    text = f"{title}\n\n{estimates.as_markdown(table)}"
    print(f"\n{text}")
    for numbers in [*record.get("curve", ()), record.get("facts", {}).get("judge", {})]:
        print(*(f"{name} {value}" for name, value in numbers.items()), sep=", ", flush=True)
    if args.markdown:
        Path(args.markdown).expanduser().write_text(text, encoding="utf-8")
    if args.json:
        Path(args.json).expanduser().write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main(common.parse(Args, {"tiny": TINY}, __doc__))
    stop()
