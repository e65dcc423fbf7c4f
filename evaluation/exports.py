"""Answers as files for other tools: evaluate.py --export FORMAT --prompts FILE --output OUTPUT.

    alpaca_eval    AlpacaEval (Li et al. 2023): a JSON list
    mt_bench       MT-Bench (Zheng et al. 2023, arXiv 2306.05685): FastChat's answer file. A later
                   turn follows the model's own answers; the category sets the temperature
    lines          src.txt, hyp.txt, ref.txt for comet-score and sacrebleu: a segment a line

FILE has the tool's own format. For lines, its rows have `prompt`, `completion`, and `source` if the
prompt has words around it. OUTPUT.partial has the answers so far: the same command continues.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import common
from data.load import read
from sampling.dialogue import Speaker
from sampling.generate import generate, text_of
from sampling.rewards import contents_of

# fastchat/llm_judge/common.py; gen_model_answer.py has 0.7 for other categories
TEMPERATURES = dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
TEMPERATURES |= {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
ENDINGS = {"alpaca_eval": ".json", "mt_bench": ".jsonl", "lines": ""}  # of --output
NEXT = {  # {0}: --output, {1}: the model's name
    "alpaca_eval": "alpaca_eval --model_outputs {0}",
    "mt_bench": "python gen_judgment.py --model-list {1}  (with {0} in data/mt_bench/model_answer)",
    "lines": "sacrebleu {0}/ref.txt -i {0}/hyp.txt; comet-score -s {0}/src.txt -t {0}/hyp.txt "
    "-r {0}/ref.txt --to_json {0}/comet.json",
}


def export(args: Any) -> None:
    kind, name = args.export, args.output or ""
    ending, output = ENDINGS.get(kind, ""), Path(name).expanduser()
    wrong = {
        "--export must be rows, alpaca_eval, mt_bench, lines (--output FILE)": kind not in ENDINGS,
        f"--export {kind} needs --output NAME{ending}": not (name and name.endswith(ending)),
        f"{output} exists, and nothing is written over": output.exists(),
        f"{output.parent}: there is no such folder": not output.parent.is_dir(),
        "--prompts must be a file of questions": not Path(str(args.prompts)).expanduser().is_file(),
        "--best-of: an export has one answer per turn": args.best_of > 1,
    }
    for problem in (message for message, is_wrong in wrong.items() if is_wrong):
        raise common.UserError(problem)
    if "max_new_tokens" not in getattr(args, "given", {"max_new_tokens"}):
        args.max_new_tokens = 1024  # FastChat's default
    run, speaker = common.Processes(), Speaker(args.model, "--model", None, args.chat_template)
    if kind == "mt_bench" and not speaker.writer.wrap:
        raise common.UserError(f"--model {args.model}: MT-Bench needs a chat template")
    facts = {x: getattr(args, x) for x in "export model max_new_tokens top_k seed dtype".split()}
    facts["weights"] = digest(common.from_main(lambda: [*contents_of(args.model).values()]))
    questions = common.from_main(lambda: read_questions(args, digest(facts)))
    facts["questions"] = digest([(x, speaker.encode(x[0][0]).tolist()) for x in questions])
    partial = output.with_name(f"{output.name}.partial")
    old = common.from_main(lambda: json.loads(partial.read_text()) if partial.is_file() else None)
    known, answers = old or (facts, [])  # an answer: [texts of its turns, how many have no end]
    if changed := [name for name in facts if known.get(name) != facts[name]]:
        other = f"{partial} is of an export with other {', '.join(changed)}"
        raise common.UserError(f"{other}: delete it, or name another --output")
    speaker.policy = common.load_policy(args, run, args.model, frozen=True)
    while len(answers) < len(questions):
        part = questions[len(answers) :][: min(args.batch_size, 64) * run.world]  # then it is saved
        answers += answer(args, run, speaker, part, len(answers))
        if common.MAIN_PROCESS:
            write_text(partial, json.dumps([facts, answers]))
    note = f"answers have no end (--max-new-tokens {args.max_new_tokens}, or the model's limit)"
    common.say("export", f"{len(questions):,} questions; {sum(cut for _, cut in answers):,} {note}")
    if common.MAIN_PROCESS:
        write(kind, output, questions, answers)
        partial.unlink()
    common.say("next", NEXT[kind].format(output, output.stem))


def read_questions(args: Any, made_by: str) -> list[tuple[list, dict, float]]:
    """(turns of the user, what the output repeats, temperature) of each question."""
    questions, at, name = [], min(args.temperature), Path(args.model).expanduser().resolve().name
    for where, row in read(args.prompts, "test", "prompt"):
        try:
            if isinstance(row, ValueError):
                raise row
            if args.export == "alpaca_eval":
                turns, fields = [row["instruction"]], {"instruction": row["instruction"]}
                fields |= {"dataset": row.get("dataset", "alpaca_eval"), "generator": name}
            elif args.export == "mt_bench":
                turns, at = row["turns"], TEMPERATURES.get(str(row["category"]), 0.7)
                fields = {"question_id": row["question_id"], "model_id": Path(args.output).stem}
                fields["answer_id"] = digest([made_by, row["question_id"]])
            else:
                turns, source = [row["prompt"]], row.get("source", row["prompt"])
                fields = {"src": source.strip(), "ref": row["completion"].strip()}
            if not turns or not all(isinstance(x, str) and x.strip() for x in turns):
                raise ValueError(f"no texts to ask: {str(turns)[:60]}")
        except KeyError as missing:
            raise common.UserError(f"{where}: no {missing}, which {args.export} needs") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise common.UserError(f"{where}: not for {args.export} ({error})") from None
        questions.append((turns, fields, at))
    if not questions:
        raise common.UserError(f"{args.prompts}: there is no question")
    return questions


def answer(args: Any, run: Any, speaker: Speaker, part: list[tuple], first: int) -> list:
    """[texts of all turns, how many have no end] of each question."""
    stops, label = speaker.tokenizer.stop_ids, f"answers from {first + 1:,}"
    limit = getattr(speaker.policy.config, "max_position_embeddings", None) or 10**9
    said, answers = [[] for _ in part], [[[], 0] for _ in part]
    for turn in range(max(len(turns) for turns, _, _ in part)):
        groups: dict[tuple, list] = {}  # few: only after long prompts is there less room
        for i, (turns, _, temperature) in enumerate(part):
            if turn < len(turns):
                said[i].append({"role": "user", "content": turns[turn]})
                prompt = speaker.encode(said[i] if turn else turns[0])
                room = min(args.max_new_tokens, max(0, limit - len(prompt)))
                groups.setdefault((room, temperature), []).append((i, prompt))
        for how, group in groups.items():
            made = generate(
                speaker.policy, [prompt for _, prompt in group], stops, *how, args.seed + turn, run,
                label=label, top_k=args.top_k, first=first,
            )  # fmt: skip
            for (i, _), ids in zip(group, made, strict=True):
                text = text_of(ids, speaker.tokenizer).strip()
                said[i].append({"role": "assistant", "content": text})
                answers[i][0].append(text)
                answers[i][1] += not len(ids) or int(ids[-1]) not in stops
    return answers


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:22]


def write_text(file: Path, text: str) -> None:
    """Under another name first: the file is complete or absent."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(file)


def write(kind: str, output: Path, questions: list, answers: list) -> None:
    rows = []
    for (_, fields, _), (texts, _) in zip(questions, answers, strict=True):
        more = {"output": texts[0]} if kind == "alpaca_eval" else {"hyp": texts[0]}
        if kind == "mt_bench":
            more = {"choices": [{"index": 0, "turns": texts}], "tstamp": time.time()}
        rows.append(fields | more)
    if kind != "lines":
        lines = [json.dumps(rows, indent=1)] if kind == "alpaca_eval" else map(json.dumps, rows)
        return write_text(output, "".join(f"{line}\n" for line in lines))
    broken = sum(bool(re.search(r"[\r\n]", text)) for row in rows for text in row.values())
    common.say("lines", f"{broken:,} segments had line breaks, which are spaces now")
    temporary = output.with_name(f"{output.name}.tmp")
    temporary.mkdir(exist_ok=True)
    for side in rows[0]:
        lines = [re.sub(r"\s*[\r\n]\s*", " ", row[side]) + "\n" for row in rows]
        (temporary / f"{side}.txt").write_text("".join(lines), "utf-8")
    temporary.rename(output)
