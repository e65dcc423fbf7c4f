"""RSO: Statistical Rejection Sampling Optimization. Liu, Zhao, Joshi, Khalman, Saleh, Liu, Liu; 2023; arXiv 2309.06657.

    pi_r(y|x)  =  pi_sft(y|x) exp( r(x, y) / beta ) / Z(x)                                                       (eq. 4)
    accept a sample y of pi_sft  if  u < exp( (r(x, y) - max r(x, y') over those not accepted yet) / beta )      (eq. 14)
    sigmoid-norm    L = - E_(x, y_w, y_l) [ log sigmoid( gamma log pi(y_w|x)/pi_sft - gamma log pi(y_l|x)/pi_sft ) ]       (eq. 8)
    hinge-norm      L =   E [ max(0, 1 - ( gamma log pi(y_w|x)/pi_sft  -  gamma log pi(y_l|x)/pi_sft )) ]        (eq. 10)
    hinge           L =   E [ max(0, 1 - ( gamma log pi(y_w|x)  -  gamma log pi(y_l|x) )) ]                      (eq. 9)

A loss on pairs fits the optimal policy pi_r if the answers in the pairs are drawn from pi_r. DPO takes them from any source,
SLiC from pi_sft. RSO samples many answers per prompt from pi_sft, scores them with a reward model, and accepts each with a
probability that makes the accepted ones a sample of pi_r (exact in the limit of many samples). The scores then rank two accepted
answers; sigmoid-norm is DPO on such pairs. beta sets how far the reward is trusted: at 0 only the best answers are
accepted, at infinity any. In the derivation gamma is the same temperature; the paper tunes the two separately.

    paper                    here
    x                        a row: a prompt; its answers are sampled (sampled.jsonl) and become pairs (accepted.jsonl;
                             of a chat model, read them with --chat-template none)
    pi_sft                   the policy before its first step, whose log-probs are ref_chosen_logps and ref_rejected_logps; with
                             --ref-model these are another model's, but samples still come from the policy
    r(x, y)                  scores: what --reward gives the whole answer (sampling/rewards.py explains a@b, two language models)
    beta                     sampling_beta, in units of the scores
    u, eq. 14, Algorithm 1   rejection_sample(): of `samples` answers per prompt, accept at most `accepted`
    y_w, y_l                 chosen, rejected: pair_up(); of two accepted answers, the one with the higher score is chosen
    gamma                    gamma, per nat; gamma log pi/pi_sft: chosen_rewards, rejected_rewards
    E                        mean over the pairs of a step, on all processes

Departures
1. The paper scores with a pairwise ranker against a random answer of pi_sft, logit rho(x, y, y_b) (eq. 7), and again to label a
   pair. Here one pointwise reward does both. It is known up to a constant per prompt, which cancels in eq. 14.
2. Duplicates: Algorithm 1 drops copies before its first pass, and with them how often the policy writes an answer, so that its
   accepted answers are no sample of pi_r if answers are short. Here every draw is a candidate, as in section 3.2, and copies
   leave when one of them is accepted. Nothing changes if all answers differ. If fewer than --accepted differ, all are accepted,
   even bad ones (Algorithm 1 would fail).
3. first-round pairs the accepted answers at random, n/2 pairs. In a tournament (SLiC's) the winners meet again, n-1 pairs: higher
   rewards, but not better answers in the paper. Equal scores make no pair. All pairs weigh the same, however many a prompt has.
4. The samples are drawn once, before training, with a fixed reference: one round. Start again with --model from the trained folder
   for another. Samples stay in --cache-dir: another --sampling-beta, --accepted, --ranking or --gamma reuses them.
5. An answer that was cut (at --max-length it has no end) is accepted like any other: --reward decides what it is worth.
6. AdamW instead of Adafactor; the last checkpoint counts, instead of the one that the ranker prefers.

Healthy (printed before training): several times as many different answers as --accepted, else nearly all are accepted and rejection
does nothing: raise --samples or --temperature. The mean accepted score is above the sampled one: if hardly, lower --sampling-beta.
Then the loss starts at ln 2 = 0.6931 (sigmoid-norm) or 1 (hinge-norm); rewards/accuracies rises from 0.5 (all ties; `tiny`: to
0.86, with answers a quarter longer). Rewards that rise while the text gets worse are over-optimisation: raise --gamma.

    python rso.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 rso.py --model runs/sft-gemma-2-2b --reward runs/reward_model-...   # a folder of reward_model.py
    python rso.py --model runs/sft-... --dataset rows.jsonl --reward mine.py:score   # {"prompt"}; score(prompts, responses) -> list of floats
"""

import gc
import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

import common
from sampling import stored
from sampling.generate import text_of
from sampling.rewards import check_reward, load_reward
from training.parallel import hash_of

HELD_OUT_PROMPTS = 256  # of the held-out ones; each gets as many samples as one to train on


@dataclass
class Args(common.Args):  # defaults: the paper's on TL;DR; other flags: common.Args
    reward: str | None = None  # a reward model, language models a@b, family, or file.py:function
    prompts: int | None = None  # number of prompts, drawn at random, to sample from; default: all
    samples: int = 64  # answers sampled per prompt
    temperature: float = 0.7  # of the samples
    top_k: int = 40  # sample only the k most likely tokens; 0: all
    sample_batch_size: int | None = None  # answers sampled at once; default: what memory allows
    sampling_beta: float = 0.5  # rejection temperature, in units of the reward; 0: the best
    accepted: int = 8  # answers per prompt that become pairs, at most; 2 or more
    ranking: Literal["first-round", "tournament"] = "first-round"  # pair at random; winners again
    gamma: float = 0.05  # temperature of the loss, per nat
    loss: Literal["sigmoid-norm", "hinge-norm", "hinge"] = "sigmoid-norm"  # norm: with a reference
    ref_model: str | None = None  # reference model, or an average a+b; default: the starting policy
    soup_weight: float = 0.5  # weight of the first model of a soup, in [0, 1]
    dataset: str | None = "tldr"  # a short name, a file, a folder, or a hub id
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens kept of the prompt; the rest is for the answer
    lr: float = 1e-5  # peak learning rate
    batch_size: int = 32  # pairs per optimizer step, over all processes
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"  # after warm-up
    max_grad_norm: float = 10.0  # clip gradients to this norm; 0: never


# What differs from the defaults, by model. The defaults are the paper's (section 5, for T5-large, an
# encoder-decoder, which does not run here; batch and lr from memory); lengths, schedule, warm-up and
# clipping are ours, as for TL;DR in slic.py.
PRESETS = {
    "tiny": dict(  # tuned here
        reward="tiny-preferred@tiny", prompts=2000, samples=16, temperature=1.0, top_k=0,
        sampling_beta=0.1, accepted=4, gamma=1.0, lr=2e-4, batch_size=16, micro_batch_size=16,
        max_steps=300, schedule="linear", warmup_ratio=0.05, max_grad_norm=1.0, max_length=176,
        max_prompt_length=160, dataset="family",
    ),
}  # fmt: skip


def rejection_sample(
    scores: list[float],  # of the samples of pi_sft, in the order in which they were drawn
    n: int,
    beta: float,
    rng: np.random.Generator,
    answers: list[str] | None = None,  # equal ones leave together; default: no two are equal
) -> list[int]:
    """Algorithm 1: indexes of at most n answers, no two equal, in the order of acceptance."""
    answers = answers or [str(i) for i in range(len(scores))]
    remaining, accepted, seen = list(range(len(scores))), [], set()
    while remaining and len(accepted) < n:
        best = max(scores[i] for i in remaining)  # in each pass at least this one is accepted
        for i in remaining:
            gap = scores[i] - best  # 0 or less, so exp cannot overflow
            chance = math.exp(gap / beta) if beta else float(gap == 0)
            if rng.random() < chance and answers[i] not in seen:
                accepted.append(i)
                seen.add(answers[i])
            if len(accepted) == n:
                break
        remaining = [i for i in remaining if answers[i] not in seen]
    return accepted


def pair_up(scores: list[float], ranking: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Indexes (winner, loser) of every game without a draw: one round of random games, or rounds
    until one player is left.
    """
    players, pairs = rng.permutation(len(scores)).tolist(), []
    while len(players) > 1:
        winners = players[len(players) // 2 * 2 :]  # an odd one; it plays first in the next round
        for a, b in zip(players[0::2], players[1::2], strict=False):
            winners.append(a if scores[a] >= scores[b] else b)  # a draw: either, places are random
            if scores[a] != scores[b]:
                pairs.append((a, b) if winners[-1] == a else (b, a))
        players = winners if ranking == "tournament" else []
    return pairs


def rso_loss(
    chosen_logps: torch.Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: torch.Tensor,  # (B,) log pi(y_l | x)
    ref_chosen_logps: torch.Tensor,  # (B,) the same under pi_sft
    ref_rejected_logps: torch.Tensor,  # (B,)
    gamma: float,
    loss: str = "sigmoid-norm",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Equations 8 to 10. Returns one loss per pair, and the metrics (one value per pair)."""
    chosen_rewards = gamma * (chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = gamma * (rejected_logps - ref_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    losses = {
        "sigmoid-norm": -F.logsigmoid(margins),
        "hinge-norm": F.relu(1 - margins),
        "hinge": F.relu(1 - gamma * (chosen_logps - rejected_logps)),  # without a reference
    }[loss]
    metrics = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,  # a tie counts half
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses, metrics


def accept_and_pair(
    sampled: list[common.Row],  # scored answers of each prompt
    args: Args,
    seed: tuple[int, int],  # the draws for a prompt depend on this and on its number only
    tokenizer: Any,
    label: str,
) -> list[common.Row]:
    """Rows of a chosen and a rejected response: every prompt's first pair, then the second ones."""
    pairs: list[list[common.Row]] = []  # of every prompt
    counts, accepted_scores = [], []
    for i, row in enumerate(sampled):
        rng = np.random.default_rng([seed[0], i, seed[1]])
        answers = [text_of(ids, tokenizer) for ids in row.responses]
        accepted = rejection_sample(
            row.scores.tolist(), args.accepted, args.sampling_beta, rng, answers
        )
        games = pair_up(row.scores[accepted].tolist(), args.ranking, rng)
        pairs.append([])
        for game in games:
            both = [accepted[k] for k in game]  # winner, loser
            responses = [row.responses[k] for k in both]
            pairs[-1].append(common.Row(row.prompt, responses, row.prompt, row.scores[both]))
        counts.append((len(set(answers)), len(accepted), len(games)))
        accepted_scores += row.scores[accepted].tolist()
    rows = [row for turn in zip_longest(*pairs) for row in turn if row]
    if rows:
        per_prompt = "{:.1f} different answers, {:.1f} accepted, {:.1f} pairs; "
        total = f"{len(rows):,} pairs of {len(sampled):,} prompts"
        common.say(label, "per prompt " + per_prompt.format(*np.mean(counts, 0)) + total)
        means = [np.mean([row.scores for row in sampled]), np.mean(accepted_scores)]
        means += np.mean([row.scores for row in rows], 0).tolist()
        text = "mean score: sampled {:.3f}, accepted {:.3f}, chosen {:.3f}, rejected {:.3f}"
        common.say("", text.format(*means))
    return rows


def write_pairs(file: Path, rows: list[common.Row], tokenizer: Any) -> None:
    """Pairs for other methods, with their scores and with the ids that are trained on here."""
    lines = []
    for row in rows:
        record: dict[str, Any] = {"prompt": stored.prompt_text(row.prompt, tokenizer)}
        for side, ids, score in zip(("chosen", "rejected"), row.responses, row.scores, strict=True):
            record |= {side: text_of(ids, tokenizer), f"{side}_score": float(score)}
            record |= {f"{side}_ids": ids.tolist()}
        lines.append(json.dumps(record | {"prompt_ids": row.prompt.tolist()}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def main(args: Args) -> None:
    if not args.gamma > 0 or not args.temperature > 0:
        raise common.UserError("--gamma and --temperature must be positive")
    if not 2 <= args.accepted <= args.samples:
        raise common.UserError("--accepted must be 2 or more, and --samples at least as many")
    if not args.reward:
        raise common.UserError("--reward: what scores the answers? A folder of reward_model.py")
    check_reward(args.reward)
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="prompt")
    order = np.random.default_rng(args.seed).permutation(len(train))[: args.prompts]
    train, held_out = [train[i] for i in order], held_out[:HELD_OUT_PROMPTS]
    run.lengths = [args.max_length]  # the longest row
    policy = common.load_policy(args, run)
    args.beta = args.gamma  # of the exported model as a reward a@b

    # Sample, score, accept: the policy is pi_sft here, also when a run continues from a checkpoint.
    reward = load_reward(args.reward, tokenizer, args, run)
    pairs = []
    for part, rows in enumerate((train, held_out)):
        prompts, name = [row.prompt for row in rows], ("sampled", "sampled-held-out")[part]
        sampled = stored.sample_and_score(
            policy, prompts, tokenizer, reward, run, seed=hash_of(args.seed, part), label=name
        )
        label = ("accepted", "held out")[part]
        pairs.append(accept_and_pair(sampled, args, (args.seed, part + 1), tokenizer, label))
    train, held_out = pairs
    if not train:
        why = "no answer to a prompt has a higher score than another"
        raise common.UserError(f"{why}: raise --temperature or --samples, or look at --reward")
    if common.MAIN_PROCESS:
        write_pairs(run.folder / "accepted.jsonl", train, tokenizer)
    del reward  # frees its memory for the optimizer
    gc.collect()

    run.plan(train)
    common.add_reference_logps(policy, args, run, train, held_out)  # before any update
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch):  # for training and for evaluation
        logps = common.response_logps(policy, batch)  # (B, 2): chosen, rejected
        ref_logps = batch.ref_logps.to(logps.dtype)  # (B, 2)
        losses, metrics = rso_loss(*logps.unbind(1), *ref_logps.unbind(1), args.gamma, args.loss)
        metrics |= {"length/chosen": batch.lengths[:, 0], "length/rejected": batch.lengths[:, 1]}
        return losses, metrics

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, tokenizer)
        for batch in step.micro_batches:
            losses, metrics = losses_of(batch)
            (losses.sum() / step.num_rows).backward()  # num_rows: over all processes
            run.record(metrics)
        common.sum_gradients(policy)  # a sum, not a mean: the loss is already divided
        grad_norm = common.clip_gradients(policy, args.max_grad_norm)
        if grad_norm.isfinite():  # the same on every process
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.end_step(grad_norm)  # logs; saves when it is due
    run.evaluate(losses_of, held_out, tokenizer)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
