"""Is it better? A trained model on held-out questions, beside the model that it began from.

    python evaluate.py --model runs/dpo                                     # the embedded task
    python evaluate.py --model runs/dpo-... --dataset tldr --reward runs/reward --text-metrics
    python evaluate.py --model runs/dpo-... --dataset tldr --baseline chosen --judge http://localhost:8000/v1 --judge-model NAME
    python evaluate.py --model runs/sft-... --dataset tldr --reward runs/reward --best-of 16 --temperature 1
    python evaluate.py --model google/gemma-2-9b-it --dataset ultrafeedback --split train --export teacher.jsonl --temperature 0.7

What is measured (a is --model, b is --baseline), each mean with a 95 % interval over questions (estimates.py)

    reward           of an answer, by --reward: a reward model, two models a@b, family, file.py:function
    win rate         share of questions on which a's answer has the higher reward, ties halved; and what it
                     would be at equal length (estimates.py), because many rewards simply like longer answers
    judge            the same by a language model behind an OpenAI-compatible endpoint (judging.py), of the
                     answers at the lowest --temperature
    KL(a || b)       mean over a's own samples of log a(y|x) - log b(y|x), nats an answer
    entropy          mean over a's own samples of -log a(y|x), nats an answer
    length           tokens, end-of-sequence included; ended: the share that has one
    distinct-n       distinct n-grams over all n-grams; repetition: share of an answer's 4-grams that stood in it
    ranking          share of held-out pairs whose chosen answer has the higher log-prob: its sum, its mean, or
                     the sum less the baseline's; mended and spoiled: of all pairs, those that b had wrong
                     and a has right, and the other way round
    text metrics     chrF, BLEU (sacrebleu) and ROUGE-L (rouge-score) against the set's own answers

Rows are held out just as the training scripts do it, so `--dataset` is what they were given. Where that is
a part of the training rows, what a's run.json tells of its run keeps out whatever it has learned from.
Answers of a and of b are drawn independently, at each --temperature; KL, entropy and log-probs of samples are at the
temperature they were drawn with. Answers lie in the cache as JSONL, by all that moves a token: a run that
was killed goes on, and another reward or judge costs no sampling. Only the last chunk is made again.

Starts on several GPUs too (torchrun --nproc_per_node=4 evaluate.py ...): questions are dealt to the
processes, each of which holds both models, frozen, in the compute dtype.

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

import common
import estimates
import generation
import scoring
from estimates import Estimate


# fmt: off
@dataclass
class Args:
    # What is compared
    model: str = "tiny"  # a: tiny, a short name (gemma-2-2b, ...), a Hugging Face id, or a folder such as runs/dpo
    baseline: str | None = None  # b: another model, `chosen` (the set's own answers), or `none`; default: what --model was trained from, as its folder tells
    # On what
    dataset: str | None = None  # as the training scripts take it; default: family for models that began from tiny
    eval_dataset: str | None = None  # held-out rows; default: those of a's own run on this dataset, else the dataset's own test split, else a twentieth of it
    split: Literal["held-out", "train"] = "held-out"  # train: for --export alone, what is learned from is no test
    prompts: int = 1024  # questions at most, and pairs at most, chosen by a hash
    skip_bad_rows: bool = False  # go on without rows that cannot be used, instead of stopping
    max_length: int | None = None  # tokens of prompt and response together, of pairs; default: 2048, or what the model takes (embedded task: 176)
    max_prompt_length: int | None = None  # tokens kept of a prompt that is too long; default: 1024, or what the model takes (embedded task: 160)
    # How answers are made
    temperature: tuple[float, ...] = (1.0, 0.0)  # of each set of answers; 0: greedy
    max_new_tokens: int | None = None  # of an answer; default: 128 (embedded task: 16)
    top_k: int = 0  # only so many of the likeliest tokens are drawn; 0: all (with a limit the log-probs of KL and entropy are still those of all)
    best_of: int = 1  # sample so many answers with a and keep the one with the highest --select-by
    seed: int = 1  # of what is sampled; b's samples have the next one
    batch_size: int = 256  # sequences at once and process
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # to compute in; default: bfloat16 on GPUs that have it, else float32
    attn: Literal["auto", "eager", "sdpa"] = "auto"  # attention; auto: sdpa, or eager where sdpa would leave something out
    cache_dir: str | None = None  # where answers and verdicts are kept; default: runs/.cache
    # By what
    reward: str | None = None  # a reward model's folder or hub id, two language models a@b, family (the true reward), or file.py:function; default: family on the embedded task, else none
    select_by: str | None = None  # what --best-of chooses by; default: --reward
    rank: bool = True  # measure how log-probs order held-out pairs, where the dataset has pairs
    text_metrics: bool = False  # chrF, BLEU and ROUGE-L against the set's own answers (pip install sacrebleu rouge-score)
    bleu_tokenize: str = "13a"  # sacrebleu's: zh, ja-mecab, ... for those languages
    judge: str | None = None  # address of an OpenAI-compatible endpoint, http://localhost:8000/v1; its key only from PLAINPREF_JUDGE_KEY or OPENAI_API_KEY
    judge_model: str | None = None  # the judge's name there
    judge_template: str = "dialogue"  # tldr, dialogue, translation, or a file with {prompt}, {answer_a} and {answer_b}
    judge_workers: int = 8  # calls under way at once
    judge_max_tokens: int = 1024  # of its reply; one that thinks aloud needs more (`cut` counts replies without a verdict)
    checkpoints: bool = False  # also reward, KL and length at each checkpoint of the model's folder, on 256 questions
    # Where it goes
    json: str | None = None  # file for all numbers
    markdown: str | None = None  # file for the table
    plot: str | None = None  # picture of length against reward
    export: str | None = None  # file for prompt/completion rows, which sft.py learns from: a's answers (the first --temperature)
    export_chosen: bool = False  # the set's own chosen answers instead
# fmt: on

CHUNK = 2_048  # answers between two writes to the cache
CURVE_QUESTIONS = 256


def begin(args: Args) -> common.Processes:
    """Fill in what was left out, refuse what cannot be, start the processes."""
    usual: dict[str, Any] = {"max_new_tokens": 128}
    if common.short_name(args.model) == "tiny":
        usual = {"max_length": 176, "max_prompt_length": 160, "max_new_tokens": 16}
        if (args.dataset or "family").split(":")[0] == "family":
            usual |= {"dataset": "family", "reward": "family"}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset is None:
        raise common.UserError("--dataset: on which questions? (a file, a short name, a hub id)")
    learned = of_run(args.model)
    if args.eval_dataset is None and learned.get("dataset") == args.dataset:
        args.eval_dataset = learned.get("eval_dataset")  # else all of --dataset was learned from
    if args.baseline is None:
        args.baseline = trained_from(args.model)
    if args.baseline not in ("none", "chosen", "tiny-untrained"):
        common.resolve_model(args.baseline, "--baseline")
    least = {"prompts": 1, "max_new_tokens": 1, "best_of": 1, "batch_size": 1, "judge_workers": 1}
    least |= {"judge_max_tokens": 1, "top_k": 0, "seed": 0, "max_length": 2, "max_prompt_length": 1}
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise common.UserError(f"{common.flag(name)} must be {low} or more")
    if not args.temperature or not all(0 <= t < float("inf") for t in args.temperature):
        raise common.UserError("--temperature must be 0 (greedy) or positive")
    if len(set(args.temperature)) < len(args.temperature):
        raise common.UserError("--temperature: each one once")
    if args.best_of > 1 and not (args.select_by or args.reward):
        raise common.UserError("--best-of needs --select-by or --reward: best by what?")
    if args.best_of > 1 and 0 in args.temperature:
        raise common.UserError("--best-of: greedy answers (temperature 0) are all the same")
    if args.best_of > args.batch_size:
        raise common.UserError("--best-of: all answers to a question are in one --batch-size")
    if args.split == "train" and not args.export:
        raise common.UserError("--split train: no number would mean anything; it is for --export")
    if args.export_chosen and not args.export:
        raise common.UserError("--export-chosen needs --export FILE")
    if bool(args.judge) != bool(args.judge_model):
        raise common.UserError("--judge and --judge-model belong together")
    if args.judge and args.baseline == "none":
        raise common.UserError("--judge compares answers, so it needs a --baseline")
    if args.judge:  # its address and its template are looked at
        judge_of(args)
    if args.plot and not args.reward:
        raise common.UserError("--plot shows length against reward, so it needs a --reward")
    for name in ("reward", "select_by"):
        if value := getattr(args, name):
            scoring.check_reward(value, common.flag(name))
    for name in ("json", "markdown", "plot", "export"):
        if (file := getattr(args, name)) and not Path(file).expanduser().parent.is_dir():
            raise common.UserError(f"{common.flag(name)} {file}: there is no such folder")
    if args.text_metrics:
        common.needed("textmetrics", "--text-metrics").check(
            ["chrf", "bleu", "rouge_l"], args.bleu_tokenize
        )
    common.hf_logging.disable_progress_bar()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if args.dtype is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if bf16 else "float32"
    torch.manual_seed(args.seed)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # The others wait while one asks a judge, or waits for another run that makes the same answers.
        dist.init_process_group(backend, timeout=timedelta(hours=24))
    return common.Processes()


def of_run(model: str) -> dict[str, Any]:
    """The arguments of the run that made a folder, and its `script`; {}: no run of ours."""
    try:
        record = json.loads((common.model_folder(model) / "run.json").read_text(encoding="utf-8"))
        return record["arguments"] | {"script": Path(next(iter(record["source"]))).stem}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return {}


def trained_from(model: str) -> str:
    """What a folder of ours began from, if that is still there."""
    before = of_run(model).get("model", "tiny-untrained")
    try:
        common.resolve_model(before)
    except common.UserError:
        return "none"
    return "none" if before == "tiny-untrained" else before


# --------------------------------------------------------------------------------------------------
# Questions, pairs, models


@dataclass
class Questions:
    prompts: list[np.ndarray]  # token ids
    own: list[np.ndarray] | None  # the set's answers to them: chosen ones, or demonstrations


def read_questions(args: Args, tokenizer: Any) -> Questions:
    own_needed = args.baseline == "chosen" or args.text_metrics or args.export_chosen
    own_test = args.split == "held-out" and not args.eval_dataset
    if args.dataset == "family" and own_test and not own_needed:
        import family

        texts = family.test_prompts(args.prompts)
        common.say("questions", f"{len(texts):,} unseen questions of the embedded task")
        return Questions([np.array(tokenizer(text).input_ids, np.int32) for text in texts], None)
    asked = read_from(args)
    embedded = asked.split(":")[0] == "family"  # its demonstrations are dialogues
    kinds = ("pair",) if embedded else ("demonstration", "prompt", "pair")
    kind = next((kind for kind in kinds if offers(asked, kind)), None)
    if kind is None:
        raise common.UserError(f"{asked}: there are no prompts in it")
    rows = read_rows(args, kind, tokenizer)
    first: dict[bytes, common.Row] = {}
    for row in rows.rows:  # one question each, and none of a text that answers nothing
        if len(row.ask) > len(tokenizer.bos):
            first.setdefault(row.ask.tobytes(), row)
    if not first:
        raise common.UserError(f"{asked}: no row asks anything (texts have no prompt)")
    kept = list(first.values())
    if len(kept) > args.prompts:
        kept, _ = common._choose(kept, args.prompts, tokenizer, rows.tail)
    common.say("questions", f"{len(kept):,} of {len(first):,}")
    own = None if kind == "prompt" else [row.responses[0] for row in kept]
    if own_needed and own is None:
        raise common.UserError(
            f"{asked}: its rows have no answers, which --baseline chosen, --text-metrics and "
            "--export-chosen need"
        )
    most = args.max_prompt_length
    return Questions([_at_most(row.ask, most, tokenizer) for row in kept], own)


def _at_most(prompt: np.ndarray, most: int, tokenizer: Any) -> np.ndarray:
    """Rows are cut where prompt and answer together are too long; here nobody knows the answer."""
    return prompt if len(prompt) <= most else common.end_of(prompt, most, tokenizer)


def read_pairs(args: Args, tokenizer: Any) -> common.Rows | None:
    if not args.rank or args.split == "train" or not offers(read_from(args), "pair"):
        return None
    rows = read_rows(args, "pair", tokenizer)
    if len(rows) > args.prompts:
        rows.rows, _ = common._choose(rows.rows, args.prompts, tokenizer, rows.tail)
    return rows


CONVERTED = {  # what a row can be turned into, by what it is
    "ranked": ("ranked", "pair", "labelled", "demonstration", "prompt"),
    "pair": ("ranked", "pair", "labelled", "demonstration", "prompt"),
    "labelled": ("labelled", "demonstration", "prompt"),
    "demonstration": ("demonstration", "prompt"),
    "messages": ("demonstration", "prompt"),
    "prompt": ("prompt",),
    "text": (),
}


def read_from(args: Args) -> str:
    return args.eval_dataset if args.eval_dataset and args.split == "held-out" else args.dataset


def offers(dataset: str, kind: str) -> bool:
    """Whether a data set has rows of that kind, or such as become it: its first row tells, of what
    is held out where a split is, for that is read anyhow.
    """
    if dataset.split(":")[0] == "family":
        return True

    def look() -> dict:
        try:
            own = None
            if sources := common.beside("sources"):
                sources.find_named(dataset, kind)
                own = sources.test_split(dataset, kind)
            for _, raw in common._raw_rows(own or dataset, "test" if own else "train", kind):
                if isinstance(raw, dict):
                    return {"offers": kind in CONVERTED[common._kind_of(raw)]}
        except common.BadRow:
            pass  # reading all of it will say what is wrong
        except common.UserError as error:  # a named set without such, or a copy of its other rows
            if not any(told in str(error) for told in ("rows are needed", "was published with")):
                raise
            return {"offers": False}
        return {"offers": True}

    return common.from_main(look)["offers"]


def read_rows(args: Args, kind: str, tokenizer: Any) -> common.Rows:
    """Held out as in training: --eval-dataset, the set's own test split, else a part of it."""
    cut = (args.max_length, args.max_prompt_length)
    how = (kind, tokenizer, cut, "best-worst", args.skip_bad_rows, False, args.cache_dir, False)
    if args.split == "train":
        return common.load_rows(
            args.dataset, args.eval_dataset, kind, tokenizer, *cut,
            skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
        )[0]  # fmt: skip
    if test := args.eval_dataset or common._own_test_split(args.dataset, kind):
        return common._read(test, "test", *how)

    def part(kind: str, *cut: int) -> common.Rows:
        return common.load_rows(
            args.dataset, None, kind, tokenizer, *cut,
            skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
        )[1]  # fmt: skip

    # Which rows these are is a matter of how many there are in all, and where prompts are cut. So a
    # run that has read them as another kind, or cut them elsewhere, has held out other ones.
    rows, run = part(kind, *cut), of_run(args.model)
    theirs = READ_AS.get(run.get("script", ""))
    their_cut = (run.get("max_length"), run.get("max_prompt_length"))
    if (
        theirs
        and all(their_cut)
        and (theirs, their_cut) != (kind, cut)
        and offers(args.dataset, theirs)
    ):
        unseen = part(theirs, *their_cut)
        end = slice(-min(rows.tail, unseen.tail) or None, None)
        asks = lambda row: row.ask[len(tokenizer.bos) :][end].tobytes()  # noqa: E731
        kept = {asks(row) for row in unseen.rows}
        rows.rows = [row for row in rows.rows if asks(row) in kept]
        common.say("held out", f"{len(rows):,} that {args.model} has not learned from")
    return rows


READ_AS = {"sft": "demonstration", "kto": "labelled"}
READ_AS |= dict.fromkeys(("dpo", "ipo", "cpo", "orpo", "simpo", "slic"), "pair")
READ_AS |= dict.fromkeys(("listwise_dpo", "pro", "rrhf"), "ranked")
READ_AS |= dict.fromkeys(("raft", "rso", "ppo", "rloo", "grpo"), "prompt")


def load(model: str, args: Args, run: common.Processes, name: str) -> nn.Module:
    return scoring.freeze(common.load_policy(model, args.dtype, run, args.attn, name=name))


def tokens_fit(tokenizer: Any, args: Args) -> None:
    """Both models are asked with the same ids."""
    theirs = common.load_tokenizer(args.baseline, 1)
    if theirs.get_vocab() != tokenizer.get_vocab() or theirs.bos != tokenizer.bos:
        raise common.UserError(
            f"--baseline {args.baseline} has another tokenizer than {args.model}: neither a KL nor "
            "the same questions. Measure each with --baseline chosen, on the same --dataset"
        )


# --------------------------------------------------------------------------------------------------
# Answers, kept as JSONL


def answers_of(
    model: nn.Module,
    name: str,
    prompts: list[np.ndarray],
    tokenizer: Any,
    args: Args,
    run: common.Processes,
    temperature: float,
    seed: int,
    samples: int = 1,
) -> list[np.ndarray]:
    """`samples` a prompt, one prompt's after another's, on every process."""

    def facts() -> dict:
        ours = [common.HERE / f"{module}.py" for module in ("common", "generation")]
        files = scoring.contents_of(name) | {f.name: common.file_hash(f) for f in ours}
        state = hashlib.sha256(b"".join(p.astype("<i4").tobytes() + b"|" for p in prompts))
        how = [temperature, seed if temperature else 0, samples, args.top_k, args.max_new_tokens]
        how += [args.dtype, args.attn, run.device.type]
        versions = [common._version(name) for name in ("torch", "transformers")]
        told = json.dumps([name, files, state.hexdigest(), how, versions], sort_keys=True)
        return {"key": hashlib.sha256(told.encode()).hexdigest()[:24]}

    folder = Path(args.cache_dir or Path("runs") / ".cache")
    file = folder / f"answers-{common.from_main(facts)['key']}.jsonl"
    lock = _locked(file) if common.MAIN_PROCESS else None
    size = max(1, CHUNK // samples)

    def there() -> dict:
        """The ids of whole prompts; what a killed run left half-written goes."""
        rows, end = [], 0
        with open(file, "a+b") as f:
            f.seek(0)
            for line, prompt in zip(f, prompts, strict=False):
                row = common.parse_json(line)
                whole = line.endswith(b"\n") and isinstance(row, dict)
                if not whole or row.get("prompt_ids") != prompt.tolist():
                    break
                rows.append(row["response_ids"])
                end += len(line)
            f.truncate(end)
        return {"ids": rows}

    try:
        known = common.from_main(there)["ids"]
        made = [np.array(ids, np.int32) for row in known for ids in row]
        for at in range(len(known), len(prompts), size):
            asked = prompts[at : at + size]
            new = generation.generate(
                model, asked, tokenizer.stop_ids, args.max_new_tokens, temperature, seed, run,
                args.batch_size, f"answers of {name}", samples, args.top_k, at,
            )  # fmt: skip
            made += new
            if common.MAIN_PROCESS:
                _append(file, asked, new, samples, tokenizer)
    finally:
        if lock:
            lock.close()
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    common.say("answers", f"of {name}, {how}: {len(made):,}, kept in {file}")
    return made


def _locked(file: Path) -> Any:
    """Another process that makes the same answers is waited for; then they are there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = open(file.with_suffix(".lock"), "w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # no such locks here (Windows, some network disks)
        pass
    return lock


def _append(
    file: Path, prompts: list[np.ndarray], made: list[np.ndarray], samples: int, tokenizer: Any
) -> None:
    with open(file, "a", encoding="utf-8") as f:
        for i, prompt in enumerate(prompts):
            own = made[i * samples : (i + 1) * samples]
            record = {
                "prompt": text_of_prompt(prompt, tokenizer),
                "responses": [generation.text_of(ids, tokenizer) for ids in own],
                "prompt_ids": prompt.tolist(),
                "response_ids": [ids.tolist() for ids in own],
            }
            f.write(json.dumps(record) + "\n")
        f.flush()
        os.fsync(f.fileno())


def text_of_prompt(ids: np.ndarray, tokenizer: Any) -> str:
    """Without the BOS that every prompt begins with, where the model has one."""
    return tokenizer.decode(ids[len(tokenizer.bos) :])


@torch.no_grad()
def logps_of(
    model: nn.Module,
    rows: list[common.Row],
    run: common.Processes,
    batch_size: int,
    label: str,
    temperature: float = 1.0,
) -> np.ndarray:
    """(N, K) sums over response tokens, on every process."""
    data, many = common.Rows(label, rows), len(rows[0].responses)
    found = torch.zeros(len(rows), many, dtype=torch.float64)
    parts = common.micro_batches(
        [row.tokens() for row in rows], list(range(len(rows))), max(1, batch_size // (4 * many))
    )
    for part, mine in run.share(parts, label):
        micro = common.collate_for(model, data, part)
        logps = common.response_logps(model, micro, temperature)[0]
        if mine:
            found[part] = logps.double().cpu()
    return common.over_processes(found).numpy()


# --------------------------------------------------------------------------------------------------
# What is measured


@dataclass
class Measured:
    """A line of the table: a number of a, the same of b, and how far they are apart."""

    label: str
    ours: Estimate
    theirs: Estimate | None = None
    change: Estimate | None = None
    digits: int = 3


@dataclass
class Side:
    """One model's answers at one temperature."""

    answers: list[np.ndarray]
    scores: np.ndarray | None  # (N,)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.answers], float)


def compare_answers(
    mode: str, ours: Side, theirs: Side | None, stop_ids: frozenset[int]
) -> dict[str, Measured]:
    """What the answers alone tell. No model, no tokenizer: numbers in, numbers out."""
    table: dict[str, Measured] = {}

    def line(key: str, label: str, of: Any, digits: int = 3) -> None:
        """`of` gives one number a question."""
        a, b = of(ours), None if theirs is None else of(theirs)
        paired = None if b is None else estimates.mean(a - b)
        table[f"{mode}/{key}"] = Measured(
            label, estimates.mean(a), None if b is None else estimates.mean(b), paired, digits
        )

    if ours.scores is not None:
        line("reward", "reward", lambda side: side.scores)
        if theirs is not None:
            wins = estimates.outcomes(ours.scores, theirs.scores)
            add_wins(table, f"{mode}/win_rate", "win rate", wins, ours, theirs)
    line("length", "length, tokens", lambda side: side.lengths, 2)
    for name, q in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95), ("longest", 1.0)):
        both = [None if side is None else Estimate(float(np.quantile(side.lengths, q)))
                for side in (ours, theirs)]  # fmt: skip
        table[f"{mode}/length/{name.replace(' %', '')}"] = Measured(f"  {name}", *both, None, 0)
    ended = lambda side: np.array([len(y) and int(y[-1]) in stop_ids for y in side.answers], float)  # noqa: E731
    line("ended", "share that ended", ended)
    for n in (1, 2):
        both = [None if side is None else Estimate(estimates.distinct(side.answers, n))
                for side in (ours, theirs)]  # fmt: skip
        table[f"{mode}/distinct-{n}"] = Measured(f"distinct {n}-grams", *both)
    line("repetition-4", "repeated 4-grams in an answer",
         lambda side: np.array([estimates.repetition(y) for y in side.answers]))  # fmt: skip
    if ours.scores is not None:
        both = [None if side is None else
                Estimate(estimates.rank_correlation(side.lengths, side.scores))
                for side in (ours, theirs)]  # fmt: skip
        table[f"{mode}/length_reward"] = Measured("rank correlation of length and reward", *both)
    return table


def add_wins(
    table: dict[str, Measured], key: str, label: str, wins: np.ndarray, ours: Side, theirs: Side
) -> None:
    """Raw and at equal length."""
    even = Estimate(0.5)
    table[key] = Measured(f"{label} against b", estimates.mean(wins), even)
    fair = estimates.win_rate_at_equal_length(wins, ours.lengths, theirs.lengths)
    table[f"{key}/length_controlled"] = Measured("  at equal length", fair, even)


def rankings(
    logps: np.ndarray,  # (N, 2) of chosen and rejected answers, sums
    lengths: np.ndarray,  # (N, 2) tokens
    base_logps: np.ndarray | None,  # (N, 2) the baseline's
    questions: np.ndarray | None = None,  # (N,) equal numbers: pairs of one question
) -> dict[str, Measured]:
    """Ties count as half: log-probs of answers that differ are hardly ever equal, those of a
    reference-normalised model that has not been trained always are.
    """
    right = lambda x: estimates.outcomes(x[:, 0], x[:, 1])  # noqa: E731
    mean = lambda values: estimates.mean(values, questions=questions)  # noqa: E731
    ours = {"sum": right(logps), "mean": right(logps / lengths)}
    base = {}
    if base_logps is not None:
        base = {"sum": right(base_logps), "mean": right(base_logps / lengths)}
        ours["reference_normalised"] = right(logps - base_logps)
    names = {
        "sum": "pairs ranked right, by sum",
        "mean": "  by mean",
        "reference_normalised": "  by sum less the baseline's",
    }
    table = {
        f"ranking/{key}": Measured(
            names[key], mean(values), mean(base[key]) if key in base else None,
            mean(values - base[key]) if key in base else None,
        )
        for key, values in ours.items()
    }  # fmt: skip
    if base:
        mended = (base["sum"] < 0.5) & (ours["sum"] > 0.5)
        spoiled = (base["sum"] > 0.5) & (ours["sum"] < 0.5)
        table["ranking/mended"] = Measured("  b wrong, a right", mean(mended))
        table["ranking/spoiled"] = Measured("  b right, a wrong", mean(spoiled))
    return table


def text_metrics(
    mode: str, ours: list[str], theirs: list[str] | None, own: list[str], tokenize: str
) -> dict[str, Measured]:
    metrics = common.needed("textmetrics", "--text-metrics")
    table: dict[str, Measured] = {}
    for key, label, of, more in (
        ("chrf", "chrF", metrics.chrf, {}),
        ("bleu", "BLEU", metrics.bleu, {"tokenize": tokenize}),
        ("rouge_l", "ROUGE-L", metrics.rouge_l, {}),
    ):
        scored = [of(texts, own, **more) for texts in (ours, theirs) if texts is not None]
        of_rows = [partial(metrics.resampled, key, np.asarray(rows)) for _, rows, _ in scored]
        found = [estimates.statistic(again, len(own)) for again in of_rows] + [None]
        change = None
        if len(scored) == 2:  # on the same questions, drawn together
            apart = lambda at, of_rows=of_rows: of_rows[0](at) - of_rows[1](at)  # noqa: E731
            change = estimates.statistic(apart, len(own))
        table[f"{mode}/{key}"] = Measured(f"{label} ({scored[0][2]})", *found[:2], change, 2)
    return table


def by_length(side: Side) -> list[dict]:
    """How many answers of each length, and their mean reward: what the bias plots show."""
    lengths = side.lengths.astype(int)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 21)).astype(int))
    place = np.searchsorted(edges, lengths, "right") - 1  # at most 21 bins of like size
    return [
        {
            "length": float(lengths[at].mean()),
            "n": int(at.sum()),
            "reward": float(side.scores[at].mean()),
        }
        for bin in range(len(edges))
        if (at := place == bin).any()
    ]


def mode_of(temperature: float) -> str:
    return {0.0: "greedy", 1.0: "sampled"}.get(temperature, f"sampled at {temperature:g}")


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    run = begin(args)
    record = measure(args, run)
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return record


def measure(args: Args, run: common.Processes) -> dict:
    steps = common.from_main(lambda: {"steps": checkpoints_of(args)})["steps"]
    tokenizer = common.load_tokenizer(args.model, args.max_length or 1)
    room = getattr(_config_of(args.model), "max_position_embeddings", None) or 2**31
    args.max_length = args.max_length or min(2048, room)
    args.max_prompt_length = args.max_prompt_length or max(1, min(1024, room - args.max_new_tokens))
    args.max_prompt_length = min(args.max_prompt_length, args.max_length - 1)
    if args.max_prompt_length + args.max_new_tokens > room:
        raise common.UserError(
            f"--max-prompt-length {args.max_prompt_length} and --max-new-tokens "
            f"{args.max_new_tokens}: {args.model} takes {room:,} tokens together"
        )
    has_base = args.baseline not in ("none", "chosen")
    if has_base:
        tokens_fit(tokenizer, args)
    questions = read_questions(args, tokenizer)
    if args.export_chosen:
        common.from_main(lambda: export(args, questions.prompts, questions.own, tokenizer))
        return {}
    pairs = read_pairs(args, tokenizer)
    policy = load(args.model, args, run, "a")
    base = load(args.baseline, args, run, "b") if has_base else None
    measures = args.split == "held-out"
    chooser = (args.select_by or args.reward) if args.best_of > 1 else None
    rewards = {
        name: scoring.load_reward(name, tokenizer, run, args.dtype, args.attn)
        for name in dict.fromkeys((args.reward if measures else None, chooser))
        if name
    }

    table: dict[str, Measured] = {}
    facts: dict[str, Any] = {}
    lengthwise: dict[str, list[dict]] = {}
    prompts = questions.prompts
    for at, temperature in enumerate(args.temperature):
        mode = mode_of(temperature)
        how = (tokenizer, args, run, temperature)
        made = answers_of(policy, args.model, prompts, *how, args.seed, args.best_of)
        if args.best_of > 1:
            repeated = [prompt for prompt in prompts for _ in range(args.best_of)]
            scores = rewards[chooser](repeated, made).view(-1, args.best_of).numpy()
            best = scores.argmax(1) + args.best_of * np.arange(len(prompts))
            made = [made[i] for i in best]
        if args.export and at == 0:
            common.from_main(lambda made=made: export(args, prompts, made, tokenizer))
        if not measures:
            return {}
        if base is not None:
            others = answers_of(base, args.baseline, prompts, *how, args.seed + 1)
        else:
            others = questions.own if args.baseline == "chosen" else None
        scored = rewards.get(args.reward)
        scores_of = lambda y, scored=scored: None if scored is None else scored(prompts, y).numpy()  # noqa: E731
        ours = Side(made, scores_of(made))
        theirs = None if others is None else Side(others, scores_of(others))
        table |= compare_answers(mode, ours, theirs, tokenizer.stop_ids)
        if temperature > 0 and args.best_of == 1:
            rows = [common.Row(p, [y], p) for p, y in zip(prompts, made, strict=True)]
            asked = (rows, run, args.batch_size)
            logps = logps_of(policy, *asked, f"log-probs of {args.model}", temperature)[:, 0]
            if base is not None:
                base_logps = logps_of(base, *asked, f"log-probs of {args.baseline}", temperature)
                kl = estimates.mean(logps - base_logps[:, 0])
                table[f"{mode}/kl"] = Measured("KL(a || b), nats an answer", kl)
            entropy = estimates.mean(-logps)
            table[f"{mode}/entropy"] = Measured("entropy, nats an answer", entropy)
        elif temperature > 0 and base is not None and args.baseline == args.model:
            # Sampling N and keeping one cannot go further than this (Beirami et al. 2024).
            n = args.best_of
            most = Estimate(float(np.log(n) - (n - 1) / n))
            table[f"{mode}/kl/at_most"] = Measured("KL(a || b), nats an answer, at most", most)
        if ours.scores is not None:
            lengthwise[mode] = by_length(ours)
            if theirs is not None:
                lengthwise[f"{mode}, baseline"] = by_length(theirs)
        if questions.own is not None and args.text_metrics:
            texts = [
                None if side is None else [generation.text_of(y, tokenizer).strip() for y in side]
                for side in (made, others, questions.own)
            ]
            if args.baseline == "chosen":  # they are what is compared with
                texts[1] = None
            found = common.from_main(
                lambda mode=mode, texts=texts: as_json(
                    text_metrics(mode, *texts, args.bleu_tokenize)
                )
            )
            table |= from_json(found)
        if args.judge and temperature == min(args.temperature):
            verdicts = common.from_main(
                lambda made=made, others=others: ask_judge(args, prompts, made, others, tokenizer)
            )
            wins = np.array([np.nan if x is None else x for x in verdicts["outcomes"]], float)
            add_wins(table, f"{mode}/judge", "judge: win rate", wins, ours, theirs)
            facts["judge"] = verdicts["facts"]

    if pairs is not None and len(pairs):
        lengths = np.array([[len(y) for y in row.responses] for row in pairs.rows], float)
        asked = (pairs.rows, run, args.batch_size)
        logps = logps_of(policy, *asked, "pairs")
        base_logps = None if base is None else logps_of(base, *asked, "pairs, baseline")
        asks = {row.ask.tobytes(): i for i, row in enumerate(pairs.rows)}
        of = np.array([asks[row.ask.tobytes()] for row in pairs.rows])
        table |= rankings(logps, lengths, base_logps, of)
    curve = checkpoints(
        args, steps, policy, base, prompts, tokenizer, rewards.get(args.reward), run
    )
    return report(args, run, table, facts, lengthwise, curve, len(prompts), pairs)


def _config_of(model: str) -> Any:
    if model == "tiny-untrained":
        return None
    from transformers import AutoConfig

    path = common.resolve_model(model)
    return common._from_hub(lambda: AutoConfig.from_pretrained(path), model)


def judge_of(args: Args) -> Any:
    cache = Path(args.cache_dir or Path("runs") / ".cache") / "verdicts.jsonl"
    how = (args.judge, args.judge_model, args.judge_template, cache)
    return common.needed("judging", "--judge").Judge(
        *how, workers=args.judge_workers, max_tokens=args.judge_max_tokens
    )


def ask_judge(args, prompts, made, others, tokenizer) -> dict:
    """On the main process: outcomes (1, 0.5, 0, or None for a verdict that could not be read)."""
    texts = [[generation.text_of(y, tokenizer).strip() for y in side] for side in (made, others)]
    asked = [text_of_prompt(prompt, tokenizer) for prompt in prompts]
    verdicts = judge_of(args).compare(asked, *texts)
    return {"outcomes": verdicts.outcomes, "facts": verdicts.facts}


def export(
    args: Args, prompts: list[np.ndarray], answers: list[np.ndarray], tokenizer: Any
) -> dict:
    """prompt/completion rows. An answer that was cut would be taught as one that ends there, so it
    is left out; and so is an empty one, which no script takes. An end that is not the usual one (a
    chat template's) stays in the text: what has learned from it ends in the same way.
    """
    lines, cut, empty = [], 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.decode([int(i) for i in answer if int(i) != tokenizer.eos_token_id])
        if not len(answer) or int(answer[-1]) not in tokenizer.stop_ids:
            cut += 1
        elif not generation.text_of(answer, tokenizer).strip():
            empty += 1
        else:
            row = {"prompt": text_of_prompt(prompt, tokenizer), "completion": text}
            lines.append(json.dumps(row) + "\n")
    common.write_atomically(Path(args.export).expanduser(), "".join(lines))
    common.say(
        "export", f"{args.export}: {len(lines):,} rows; left out: {cut:,} cut, {empty:,} empty"
    )
    return {}


def checkpoints_of(args: Args) -> list[int]:
    """Steps. Looked at before anything else is: nobody wants to hear of damage after an hour."""
    folder = common.model_folder(args.model)
    if not args.checkpoints:
        return []
    numbers = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted(int(number) for number in numbers if number.isdigit())
    if not steps:
        raise common.UserError(f"--checkpoints: there is no checkpoint-* in {folder}")
    for path in (folder / f"checkpoint-{step}" for step in steps):
        if damage := common.damage_of(path):
            raise common.UserError(f"--checkpoints: {path} is damaged ({damage})")
        with safe_open(path / "policy.safetensors", "pt") as saved:
            if any(".lora_" in name for name in saved.keys()):
                raise common.UserError(f"--checkpoints: {path} holds adapters, not the weights")
    return steps


def checkpoints(args, steps, policy, base, prompts, tokenizer, reward, run) -> list[dict]:
    """Reward, KL and length along the run, at temperature 1, on some of the questions. The weights
    of the policy are overwritten.
    """
    prompts, curve, tensors = prompts[:CURVE_QUESTIONS], [], common._state_tensors(policy)
    for step in steps:
        file = common.model_folder(args.model) / f"checkpoint-{step}" / "policy.safetensors"
        with safe_open(file, "pt") as saved:
            prefix = "" if set(tensors) <= set(saved.keys()) else "policy."  # ppo.py's has two
            for name, tensor in tensors.items():
                common.put(tensor, saved, prefix + name)
        made = generation.generate(
            policy, prompts, tokenizer.stop_ids, args.max_new_tokens, 1.0, args.seed, run,
            args.batch_size, f"step {step}",
        )  # fmt: skip
        point = {"step": step, "length": float(np.mean([len(y) for y in made]))}
        if reward is not None:
            point["reward"] = float(reward(prompts, made).mean())
        if base is not None:
            rows = [common.Row(p, [y], p) for p, y in zip(prompts, made, strict=True)]
            both = [logps_of(m, rows, run, args.batch_size, f"step {step}") for m in (policy, base)]
            point["kl"] = float((both[0] - both[1]).mean())
        curve.append(point)
    return curve


# --------------------------------------------------------------------------------------------------
# The report


def as_json(table: dict[str, Measured]) -> dict:
    return {key: asdict(line) for key, line in table.items()}


def from_json(found: dict) -> dict[str, Measured]:
    """What the main process alone has measured, on the others."""
    parts = ("ours", "theirs", "change")
    return {
        key: Measured(**line | {part: line[part] and Estimate(**line[part]) for part in parts})
        for key, line in found.items()
    }


def shown(estimate: Estimate | None, digits: int, signed: bool = False) -> str:
    if estimate is None or estimate.value is None or not np.isfinite(estimate.value):
        return ""
    sign = "+" if signed else ""
    text = f"{estimate.value:{sign}.{digits}f}"
    if estimate.low is None:
        return text
    return f"{text} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"


def report(args, run, table, facts, lengthwise, curve, n, pairs) -> dict:
    """On screen, and wherever it was asked for."""
    sides = ("value", "baseline", "difference")
    measured = {side: {} for side in sides}
    for key, line in table.items():
        for side, estimate in zip(sides, (line.ours, line.theirs, line.change), strict=True):
            if estimate is not None:
                measured[side][key] = estimate.as_dict()
    facts |= {
        "commit": common._git_commit(),
        "versions": {name: common._version(name) for name in ("torch", "transformers", "numpy")},
        "questions": n,
        "pairs": 0 if pairs is None else len(pairs),
    }
    record = {
        "arguments": asdict(args), "measured": measured["value"], "baseline": measured["baseline"],
        "difference": measured["difference"], "by_length": lengthwise, "curve": curve,
        "facts": facts,
    }  # fmt: skip
    if not common.MAIN_PROCESS:
        return record
    about = f"a: {args.model}; b: {args.baseline}; {n:,} questions of {args.dataset}"
    about += f", reward: {args.reward}" if args.reward else ""
    about += f", best of {args.best_of} by {args.select_by or args.reward}" * (args.best_of > 1)
    heads = ("", "a [95 %]", "b [95 %]", "a - b [95 %]")
    lines, before = [], None
    for key, line in table.items():
        mode = key.split("/")[0]
        if mode != before:
            lines.append((f"{mode}:", "", "", ""))
        before = mode
        cells = (line.ours, line.theirs, line.change)
        signs = (False, False, True)
        lines.append((f"  {line.label}", *(shown(c, line.digits, s)
                                           for c, s in zip(cells, signs, strict=True))))  # fmt: skip
    for point in curve:
        told = ", ".join(f"{k} {v:.3f}" for k, v in point.items() if k != "step")
        lines.append((f"  step {point['step']}: {told}", "", "", ""))
    widths = [max(len(row[i]) for row in (heads, *lines)) for i in range(4)]
    widths[0] = min(widths[0], 42)
    text = "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *lines)
    )
    print(f"\n{about}\n{text}\n", flush=True)
    if "judge" in facts:
        print("judge: " + ", ".join(f"{k} {v}" for k, v in facts["judge"].items()), flush=True)
    if args.json:
        common.write_atomically(Path(args.json).expanduser(), json.dumps(record, indent=1) + "\n")
    if args.markdown:
        cells = lambda row: (cell.strip().replace("|", "\\|") for cell in row)  # noqa: E731
        rows = ["| " + " | ".join(cells(row)) + " |" for row in (heads, *lines)]
        rows.insert(1, "|---" * 4 + "|")
        common.write_atomically(
            Path(args.markdown).expanduser(), f"{about}\n\n" + "\n".join(rows) + "\n"
        )
    if args.plot:
        plot(Path(args.plot).expanduser(), lengthwise)
    return record


def plot(file: Path, lengthwise: dict[str, list[dict]]) -> None:
    """Reward against length, the area of a dot being how many answers are that long."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    modes = [mode for mode in lengthwise if not mode.endswith(", baseline")]
    figure, axes = plt.subplots(1, len(modes), figsize=(4.6 * len(modes), 3.4), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        for name, key, style in (
            ("b", f"{mode}, baseline", {"color": "#e69f00", "linestyle": "--", "marker": "s"}),
            ("a", mode, {"color": "#0072b2", "linestyle": "-", "marker": "o"}),
        ):
            if key not in lengthwise:
                continue
            x, y, n = (np.array([p[k] for p in lengthwise[key]]) for k in ("length", "reward", "n"))
            axis.plot(x, y, style["linestyle"], color=style["color"], linewidth=1)
            areas = 12 + 300 * n / n.sum()
            axis.scatter(x, y, areas, color=style["color"], marker=style["marker"], alpha=0.7)
            axis.annotate(name, (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points",
                          color=style["color"])  # fmt: skip
        axis.set(title=mode, xlabel="length, tokens", ylabel="mean reward")
    figure.tight_layout()
    temporary = file.with_name(f".{file.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, file)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
