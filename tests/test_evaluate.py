"""A model next to another: every number against plain Transformers and plain loops."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    ROOT,
    labelled_rows,
    make_checkpoint,
    pair_rows,
    ranked_rows,
    run_script,
    text,
    write_jsonl,
)
from safetensors.torch import save_file

import common
import evaluate
from evaluation import questions
from evaluation.estimates import outcomes

SCORES = """
def words(prompts, responses):
    return [len(set(answer.split())) - 0.1 * len(answer) for answer in responses]

def letters(prompts, responses):
    return [sum(c.isalpha() for c in answer) / max(1, len(answer)) for answer in responses]
"""
scores: dict = {}
exec(SCORES, scores)
STOPS = {1, *range(30, 60)}  # many, so that some answers end


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Models a and b, a with a little noise; 40 pairs; a file of rewards."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_checkpoint("llama", folder / "b")
    settings = {"eos_token_id": sorted(STOPS), "bos_token_id": 0}
    (folder / "b" / "generation_config.json").write_text(json.dumps(settings))
    shutil.copytree(folder / "b", folder / "a")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "b")
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(folder / "a")
    write_jsonl(folder / "pairs.jsonl", pair_rows(40))
    (folder / "score.py").write_text(SCORES)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def answers(monkeypatch) -> list[tuple[list, list]]:
    """The prompts and answers of every call of generate."""
    calls, generate = [], evaluate.generate

    def recorded(policy, prompts, *how):
        calls.append(([x.tolist() for x in prompts], generate(policy, prompts, *how)))
        return calls[-1][1]

    monkeypatch.setattr(evaluate, "generate", recorded)
    return calls


@pytest.fixture
def ev(made):
    """ev(**flags) -> what a whole run in this process measured."""

    def go(**flags) -> dict:
        usual = {
            "model": str(made / "a"), "baseline": str(made / "b"), "dtype": "float32",
            "dataset": str(made / "pairs.jsonl"), "eval_dataset": str(made / "pairs.jsonl"),
            "reward": f"{made / 'score.py'}:words", "max_length": 64, "max_prompt_length": 50,
            "max_new_tokens": 6,
        }  # fmt: skip
        return evaluate.main(evaluate.Args(**usual | flags))

    return go


def plain_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def plain_logp(model, prompt, answer) -> float:
    """One text, alone in its batch, from the logits of plain Transformers."""
    ids = torch.tensor([[*map(int, prompt), *map(int, answer)]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum().item()


def texts_of(ids: list, made: Path) -> list[str]:
    tokenizer = common.load_tokenizer(str(made / "a"))
    return [evaluate.text_of(y, tokenizer) for y in ids]


def value(record: dict, key: str, side: str = "measured") -> float:
    return record[side][key]["value"]


def rows_of(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


# -- what is measured


def test_a_model_next_to_itself(ev, made):
    found = ev(baseline=str(made / "a"))
    assert value(found, "sampled/kl") == pytest.approx(0, abs=1e-6)
    assert value(found, "ranking/reference_normalised") == 0.5
    assert value(found, "greedy/win_rate/length_controlled") == 0.5
    for name in ("greedy/reward", "greedy/length", "greedy/ended", "ranking/sum"):
        assert value(found, name, "difference") == 0
    # Samples are independent: 1/2, within 4 standard errors of at most 0.5 / sqrt(n).
    assert 0 < abs(value(found, "sampled/win_rate") - 0.5) < 4 * 0.5 / 40**0.5


def test_numbers_of_answers_are_those_of_plain_loops(ev, made, answers):
    found = ev(prompts=30)
    models = [plain_model(made / name) for name in "ab"]
    for mode, at in (("sampled", 0), ("greedy", 2)):
        (prompts, ours), (_, theirs) = answers[at : at + 2]
        assert len({tuple(prompt) for prompt in prompts}) == 30
        for side, ids in (("measured", ours), ("baseline", theirs)):
            ended = np.mean([y[-1] in STOPS for y in ids])
            assert value(found, f"{mode}/length", side) == np.mean([*map(len, ids)])
            assert value(found, f"{mode}/ended", side) == pytest.approx(ended)
            rewards = scores["words"](None, texts_of(ids, made))
            assert value(found, f"{mode}/reward", side) == pytest.approx(np.mean(rewards))
        both = [scores["words"](None, texts_of(ids, made)) for ids in (ours, theirs)]
        won = [(x > y) + (x == y) / 2 for x, y in zip(*both, strict=True)]
        assert value(found, f"{mode}/win_rate") == pytest.approx(np.mean(won))
    prompts, ours = answers[0]
    rows = [*zip(prompts, ours, strict=True)]
    logps = np.array([[plain_logp(model, *row) for model in models] for row in rows])
    kl = (logps[:, 0] - logps[:, 1]).mean()
    assert value(found, "sampled/kl") == pytest.approx(kl, abs=1e-4) and abs(kl) > 0.05
    assert value(found, "sampled/entropy") == pytest.approx(-logps[:, 0].mean(), abs=1e-4)
    assert 0 < value(found, "sampled/ended") < 1 and "greedy/kl" not in found["measured"]


def test_ranking_is_that_of_a_plain_loop(ev, made):
    found = ev(temperature=(0.0,))
    models = [plain_model(made / name) for name in "ab"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "a")
    sums, lengths = [], []
    for row in pair_rows(40):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [
            tokenizer(row[k], add_special_tokens=False).input_ids for k in ("chosen", "rejected")
        ]
        responses = [[*y, tokenizer.eos_token_id] for y in ids]
        sums.append([[plain_logp(m, prompt, y) for y in responses] for m in models])
        lengths.append([len(y) for y in responses])
    sums, lengths = np.array(sums), np.array(lengths)  # (N, model, response), (N, response)
    right = sums[:, :, 0] > sums[:, :, 1]
    by_mean = (sums / lengths[:, None])[:, :, 0] > (sums / lengths[:, None])[:, :, 1]
    implicit = sums[:, 0] - sums[:, 1]
    for side, at in (("measured", 0), ("baseline", 1)):
        assert value(found, "ranking/sum", side) == pytest.approx(right[:, at].mean())
        assert value(found, "ranking/mean", side) == pytest.approx(by_mean[:, at].mean())
    expected = (implicit[:, 0] > implicit[:, 1]).mean()
    assert value(found, "ranking/reference_normalised") == pytest.approx(expected)
    margin = (implicit[:, 0] - implicit[:, 1]).mean()
    assert value(found, "ranking/margin") == pytest.approx(margin, rel=1e-4)
    assert found["facts"]["pairs"] == 40


# -- best of N, export


def test_best_of_n_is_the_best_by_a_plain_loop(ev, made, answers):
    for select_by in ("words", "letters"):
        answers.clear()
        found = ev(
            best_of=4, temperature=(1.0,), prompts=20, select_by=f"{made}/score.py:{select_by}"
        )
        (_, ours), (_, theirs) = answers
        assert (len(ours), len(theirs)) == (80, 20)
        texts = texts_of(ours, made)
        by, rewards = (
            np.reshape(scores[name](None, texts), (20, 4)) for name in (select_by, "words")
        )
        best = rewards[np.arange(20), by.argmax(1)]
        assert value(found, "sampled/reward") == pytest.approx(best.mean())
        # The best of 4 has another distribution than a.
        assert not [key for key in found["measured"] if "kl" in key or "entropy" in key]
    ev(temperature=(1.0,), prompts=20, baseline="none")
    assert [y.tolist() for y in answers[-1][1]] == [y.tolist() for y in ours[::4]]


def test_export(ev, made, answers, capsys):
    ev(export="rows", output="out.jsonl", temperature=(1.0,), baseline="none")
    prompts, ours = answers[0]
    texts = texts_of(ours, made)
    whole = [i for i, y in enumerate(ours) if y[-1] in STOPS and texts[i].strip()]
    assert f"{len(whole)} of 40 answers; others are cut or empty" in capsys.readouterr().out
    tokenizer, rows = common.load_tokenizer(str(made / "a")), rows_of("out.jsonl")
    assert 0 < len(rows) < 40
    for row, i in zip(rows, whole, strict=True):
        assert row["prompt"] == tokenizer.decode(prompts[i][1:])  # without BOS
        # An end that is not the usual one (a chat template's) stays in the text.
        assert row["completion"] == tokenizer.decode([t for t in ours[i].tolist() if t != 1])


# -- questions and baselines


def test_the_data_sets_responses_as_baseline(ev):
    found = ev(baseline="chosen", temperature=(0.0,))
    rewards = scores["words"](None, [row["chosen"] for row in pair_rows(40)])
    assert value(found, "greedy/reward", "baseline") == pytest.approx(np.mean(rewards))
    assert value(found, "greedy/ended", "baseline") == 1
    absent = {"greedy/kl", "ranking/reference_normalised"}
    assert not absent & found["measured"].keys()


def test_a_measure_is_what_it_is_as_a_reward(ev, made):
    letters, how = f"{made}/score.py:letters", {"temperature": (0.0,), "prompts": 10}
    found, as_reward = ev(measure=(letters,), **how), ev(reward=letters, **how)
    for side in ("measured", "baseline", "difference"):
        assert found[side]["greedy/letters"] == as_reward[side]["greedy/reward"]
    assert found["measured"]["greedy/letters"] != found["measured"]["greedy/reward"]


def test_a_question_is_asked_once_and_keeps_its_end(ev, made, answers):
    rows = pair_rows(6)
    write_jsonl(Path("twice.jsonl"), rows + [row | {"chosen": " other"} for row in rows[:4]])
    found = ev(eval_dataset="twice.jsonl", temperature=(0.0,), baseline="none")
    assert (found["facts"]["questions"], found["facts"]["pairs"]) == (6, 10)
    assert found["measured"]["ranking/sum"]["n"] == 6  # what an interval is about
    random_text = random.Random(0)
    long = [{"prompt": text(random_text, 30, 40) + f" number {i}?"} for i in range(4)]
    write_jsonl(Path("long.jsonl"), long)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "a")
    whole = [tokenizer(row["prompt"]).input_ids for row in long]
    ev(eval_dataset="long.jsonl", baseline="none", temperature=(0.0,), max_prompt_length=20)
    assert {tuple(prompt) for prompt in answers[-1][0]} == {(0, *ids[-19:]) for ids in whole}


KINDS = {
    "pair": {"chosen": " a", "rejected": " b"},
    "ranked": {"responses": [" a", " b"], "scores": [1, 0]},
    "labelled": {"completion": " a", "label": True},
    "demonstration": {"completion": " a"},
    "prompt": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows(kind, ev, capsys):
    write_jsonl(Path("rows.jsonl"), [{"prompt": "q"} | KINDS[kind]])
    found = ev(eval_dataset="rows.jsonl", temperature=(0.0,), baseline="none")
    has_pairs = kind in ("pair", "ranked")
    assert (found["facts"]["questions"], found["facts"]["pairs"]) == (1, has_pairs)
    assert ("ranking    skipped" in capsys.readouterr().out) == (not has_pairs)


def save_run(made: Path, folder: str, script: str = "dpo", **arguments) -> None:
    shutil.copytree(made / "a", folder)
    record = {"arguments": arguments, "source": {f"{script}.py": "..."}}
    Path(folder, "run.json").write_text(json.dumps(record))


def test_what_a_run_says_about_itself(ev, made):
    """What it started from, and on which rows it was evaluated."""
    pairs = str(made / "pairs.jsonl")
    save_run(made, "run", model=str(made / "b"), dataset="rows.jsonl", eval_dataset=pairs)
    found = ev(model="run", baseline=None, dataset="rows.jsonl", eval_dataset=None, prompts=9,
               temperature=(0.0,))  # fmt: skip
    assert found["arguments"]["baseline"] == str(made / "b")
    assert found["arguments"]["eval_dataset"] == pairs
    save_run(made, "other", model="gemma-2-2b", dataset="rows.jsonl")
    args = evaluate.Args(model="other", dataset=pairs)
    evaluate.complete(args)
    assert (args.baseline, args.eval_dataset, args.reward) == ("gemma-2-2b", None, None)
    with pytest.raises(ValueError, match="--baseline runs/gone: there is no such folder"):
        ev(baseline="runs/gone")
    Path("run/run.json").write_text("[]")
    assert questions.run_of("run") == questions.run_of("gone") == {}


def test_without_a_data_set_it_follows_the_run(ev, made, capsys, monkeypatch):
    """Its rows, its lengths, the reward that it was measured by. One report, some answers."""
    monkeypatch.setenv("COLUMNS", "80")
    write_jsonl(Path("rows.jsonl"), pair_rows(300))
    file = made / "score.py"
    rewards = {"reward": f"{file}:letters", "gold_reward": f"{file}:words"}
    arguments = {"model": str(made / "b"), "dataset": "rows.jsonl", "eval_dataset": None}
    arguments |= {"max_length": 64, "max_prompt_length": 50, "chat_template": "none"} | rewards
    save_run(made, "run", "grpo", **arguments)
    found = evaluate.main(evaluate.Args(model="run", dtype="float32", prompts=9))
    used, out = found["arguments"], capsys.readouterr().out
    assert (used["dataset"], used["reward"]) == ("rows.jsonl", rewards["gold_reward"])
    assert (used["max_length"], used["max_new_tokens"], used["chat_template"]) == (64, 14, "none")
    assert "as in the run run: --dataset rows.jsonl" in out and out.count("first row") == 1
    shown = re.findall(r"^question (\d), answers greedy: .*\n-- run: .*\n(?:.*\n)+?-- /", out, re.M)
    assert shown == ["1", "2", "3"]
    args = evaluate.Args(model=str(made / "a"), reward="run")  # or the run of the reward
    evaluate.complete(args)
    assert (args.dataset, args.reward, args.max_length) == ("rows.jsonl", "run", 64)
    args = evaluate.Args(model="run", dataset="other.jsonl", chat_template="auto")
    evaluate.complete(args)
    assert (args.reward, args.max_length, args.chat_template) == (None, 2048, "none")


def test_it_knows_what_each_method_reads():
    sources = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    found = {name: re.search(r'load_rows\([^)]*kind="(\w+)"', x) for name, x in sources.items()}
    read = {name: match[1] for name, match in found.items() if match and name != "reward_model"}
    assert len(read) == 17
    assert {name: kind for name, kind in read.items() if kind != "pair"} == questions.READ_AS


@pytest.mark.parametrize("script, kind", [("kto", "labelled"), ("sft", "demonstration"),
                                          ("dpo", "pair"), ("ppo", "prompt")])  # fmt: skip
def test_nothing_that_was_learned_is_asked(script, kind, made):
    """Other kinds of the same training rows hold out other prompts."""
    rows = labelled_rows(300, seed=2) if script == "sft" else ranked_rows(300, seed=2)
    for i, row in enumerate(rows):
        row["prompt"] = f"{row['prompt']} {i:03}"
    dataset = str(write_jsonl(Path("rows.jsonl"), rows))
    tokenizer = common.load_tokenizer(str(made / "a"))
    save_run(made, "run", script, dataset=dataset, max_length=60, max_prompt_length=18)
    args = evaluate.Args(model="run", dataset=dataset, max_length=60, max_prompt_length=18)
    learned = {row.key for row in common.load_rows(args, tokenizer, kind)[0]}
    args.max_length, args.max_prompt_length = 64, 50
    for other in ("prompt", "demonstration") + (("pair",) if script != "sft" else ()):
        asked = questions.load_rows(args, other, tokenizer)
        assert len(asked) >= 2 and not [row for row in asked if row.key in learned]


def test_the_embedded_task():
    """All defaults: the true reward, unseen questions, no baseline."""
    words = ["--prompts", "16", "--temperature", "0"]
    found = evaluate.main(common.parse(evaluate.Args, {"tiny": evaluate.TINY}, "", words))
    used = found["arguments"]
    assert (used["dataset"], used["reward"], used["baseline"]) == ("family", "family", "none")
    assert (used["max_length"], used["temperature"]) == (176, (0.0,))
    assert 0 < value(found, "greedy/reward") <= 1 and value(found, "greedy/ended") > 0.9
    assert found["facts"]["questions"] == found["facts"]["pairs"] == 16


def test_checkpoints(ev, made):
    """Of the weights of b, as ppo.py saves them, then of a."""
    shutil.copytree(made / "a", "run")
    args, run = evaluate.Args(dtype="float32"), common.Processes()
    for step, name, prefix in ((10, "a", "weight|"), (9, "b", "weight|policy.")):
        policy = common.load_policy(args, run, str(made / name))
        Path(f"run/checkpoint-{step}").mkdir()
        tensors = {prefix + key: p for key, p in policy.named_parameters()}
        save_file(tensors, f"run/checkpoint-{step}/state.safetensors")
    found = ev(model="run", checkpoints=True, temperature=(1.0,))
    before, after = found["curve"]
    assert (before["step"], after["step"], before["kl"]) == (9, 10, 0)
    for key in ("length", "reward", "kl"):
        assert after[key] == pytest.approx(value(found, f"sampled/{key}"))


# -- text metrics, judge, outputs


def test_text_metrics(ev, made, answers):
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    found = ev(text_metrics=True, temperature=(0.0,), prompts=15)
    prompts, ids = answers[0]
    tokenizer = common.load_tokenizer(str(made / "a"))
    chosen = {row["prompt"]: row["chosen"].strip() for row in pair_rows(40)}
    references = [[chosen[tokenizer.decode(prompt[1:])] for prompt in prompts]]
    lines = [" ".join(line.split()) for line in texts_of(ids, made)]
    chrf = sacrebleu.corpus_chrf(lines, references).score
    assert value(found, "greedy/chrf") == pytest.approx(chrf)
    assert "greedy/bleu" in found["baseline"] and len(found["facts"]["signatures"]) == 3


class StubJudge:
    """Prefers the longer answer, and cannot judge the third."""

    def __init__(self, *how):
        self.facts = {"how": [str(word) for word in how]}

    def compare(self, prompts, first, second):
        StubJudge.asked = prompts, first, second
        better = outcomes(*(np.array([*map(len, side)]) for side in (first, second))).tolist()
        StubJudge.said = [*better[:2], None, *better[3:]]
        return {"outcomes": StubJudge.said, "facts": self.facts}


def test_the_judge(ev, made, answers, monkeypatch):
    monkeypatch.setattr(evaluate, "Judge", StubJudge)
    found = ev(judge="http://localhost:1/v1", judge_model="m", prompts=12)
    prompts, *sides = StubJudge.asked  # greedy answers only
    greedy = [[line.strip() for line in texts_of(ids, made)] for _, ids in answers[2:]]
    assert sides == greedy
    assert {*prompts} <= {row["prompt"] for row in pair_rows(40)}  # without BOS
    won = np.mean([x for x in StubJudge.said if x is not None])
    assert value(found, "greedy/judge") == pytest.approx(won)
    assert found["measured"]["greedy/judge/length_controlled"]["n"] == 11
    assert "sampled/judge" not in found["measured"]
    where = ["http://localhost:1/v1", "m", "dialogue", "runs/.cache/verdicts.jsonl", "1024"]
    assert found["facts"]["judge"] == {"how": where}


def test_files_and_screen_show_the_same(ev, capsys):
    found = ev(json="out.json", markdown="out.md", prompts=12)
    saved = json.loads(Path("out.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert saved == json.loads(json.dumps(found))
    shown = Path("out.md").read_text()
    assert shown in capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in shown.splitlines()[4:]]
    for key, *cells in ([cell.strip() for cell in row] for row in rows):
        for side, cell in zip(("measured", "baseline", "difference"), cells, strict=True):
            sign, numbers = "+" if side == "difference" else "", saved[side].get(key, {})
            parts = [numbers.get(part) for part in ("value", "low", "high")]
            expected = [f"{number:{sign}.3f}" for number in parts if number is not None]
            assert re.findall(r"[-+.\d]+", cell) == expected


JUDGED = {"judge": "http://localhost:1/v1", "judge_model": "m"}
WRONG = [
    ({"dataset": None}, "--dataset is needed"),
    ({"max_new_tokens": 0}, "--max-length must hold"),
    ({"max_new_tokens": 15}, "--max-length must hold"),
    ({"max_length": 200}, "takes at most 128 tokens"),
    ({"temperature": (-1.0,)}, "--temperature must be 0"),
    ({"best_of": 2, "reward": None}, "--best-of needs --reward"),
    ({"best_of": 2}, "--best-of needs --temperature"),
    ({"best_of": 300}, "--best-of must be 1 to --batch-size"),
    ({"model": "runs/gone"}, "--model runs/gone: there is no such folder"),
    (JUDGED | {"baseline": "none"}, "--judge needs --judge-model and a --baseline"),
    (JUDGED | {"judge": "localhost"}, "--judge must be a URL"),
    (JUDGED | {"judge_template": "no"}, "--judge-template no"),
    ({"reward": "runs/gone"}, "--reward runs/gone"),
    ({"json": "gone/out.json"}, "gone/out.json: there is no such folder"),
    ({"checkpoints": True}, "--checkpoints: there are none"),
]


@pytest.mark.parametrize("flags, words", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_what_cannot_work_is_refused_before_a_model_is_loaded(flags, words, ev, monkeypatch):
    monkeypatch.setattr(common, "load_policy", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ValueError, match=re.escape(words)):
        ev(**flags)


def test_tokenizers(ev, checkpoints, answers):
    """Without BOS prompts are whole; b must have the tokenizer of a."""
    gpt2 = str(checkpoints("gpt2"))
    with pytest.raises(ValueError, match="has another tokenizer"):
        ev(baseline=gpt2)
    ev(model=gpt2, baseline="none", temperature=(0.0,))
    tokenizer = common.load_tokenizer(gpt2)
    asked = {tokenizer.decode(prompt) for prompt in answers[-1][0]}
    assert asked == {row["prompt"] for row in pair_rows(40)}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_of_a_real_run(made, tmp_path):
    sizes = ["--dataset", made / "pairs.jsonl", "--eval-dataset", made / "pairs.jsonl"]
    sizes += ["--max-length", 64, "--max-prompt-length", 50, "--dtype", "float64"]
    run, records = tmp_path / "run", []
    train = ["--model", made / "b", "--output-dir", run, "--lr", 0.01, "--batch-size", 8]
    train += ["--max-steps", 4, "--save-every", 2, "--keep-last", 9, *sizes]
    assert run_script("dpo.py", *train)[0] == 0
    for processes in (1, 2):
        words = ["--model", run, "--reward", f"{made / 'score.py'}:words", "--max-new-tokens", 6]
        words += ["--checkpoints", "--json", tmp_path / f"{processes}.json", *sizes]
        status, _, err = run_script("evaluate.py", *words, processes=processes)
        assert status == 0, err
        records.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    one, two = ({**record["measured"], **record["difference"]} for record in records)
    assert one.keys() == two.keys() and len(one) > 10
    for key in one:
        numbers = [[x for x in found[key].values() if x is not None] for found in (one, two)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-9), key
    (_, last), (_, other) = (record["curve"] for record in records)
    for key in ("length", "reward", "kl"):  # the last checkpoint is the exported model
        assert last[key] == pytest.approx(value(records[0], f"sampled/{key}"), abs=1e-5)
        assert last[key] == pytest.approx(other[key], rel=1e-9)
