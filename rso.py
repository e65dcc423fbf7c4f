"""RSO: Statistical Rejection Sampling Optimization. Liu, Zhao, Joshi, Khalman, Saleh, Liu, Liu; 2023; arXiv 2309.06657.

    pi_r(y|x)  =  pi_sft(y|x) exp( r(x, y) / beta ) / Z(x)                                                       (eq. 4)
    accept a sample y of pi_sft  if  u < exp( (r(x, y) - max r(x, y') over those not accepted yet) / beta )      (eq. 14)
    sigmoid-norm    L = - E_(x, y_w, y_l) [ log sigmoid( gamma log pi(y_w|x)/pi_sft - gamma log pi(y_l|x)/pi_sft ) ]       (eq. 8)
    hinge-norm      L =   E [ max(0, 1 - ( gamma log pi(y_w|x)/pi_sft  -  gamma log pi(y_l|x)/pi_sft )) ]        (eq. 10)
    hinge           L =   E [ max(0, 1 - ( gamma log pi(y_w|x)  -  gamma log pi(y_l|x) )) ]                      (eq. 9)

A loss on pairs fits the best policy pi_r if the answers in them are drawn from pi_r. DPO's come from whoever wrote them,
SLiC's from pi_sft. Here pi_sft writes many answers to a prompt, a reward model scores them, and each is accepted with a
probability that makes the accepted ones a sample of pi_r: exactly with ever more samples, nearly so here. The scores then say
which of two accepted ones is the better, and sigmoid-norm is DPO on such pairs. beta says how far the reward is trusted: at 0
the best answers are accepted, at infinity any. gamma is the same temperature by derivation; the paper tunes the two apart.

    paper                    here
    x                        a row: a prompt, its answers are sampled (sampled.jsonl) and become pairs (accepted.jsonl)
    pi_sft                   the policy before its first step; its log-probs are ref_chosen_logps, ref_rejected_logps, but
                             with --ref-model those are another model's: samples still come from the policy
    r(x, y)                  scores: what --reward says of the whole answer (scoring.py explains a@b, two language models)
    beta                     sampling_beta, in the units of the scores
    u, eq. 14, Algorithm 1   rejection_sample(): of `samples` answers a prompt at most `accepted` stay
    y_w, y_l                 chosen, rejected: by pair_up(), of two accepted answers the one with the higher score
    gamma                    gamma, per nat; gamma log pi/pi_sft: chosen_rewards, rejected_rewards
    E                        mean over the pairs of a step, on all processes

Options and departures
1. The paper asks a pairwise ranker against a random answer of pi_sft, logit rho(x, y, y_b) (eq. 7), and again for the label of
   a pair. Here one pointwise reward does both. It has a constant per prompt free, of which eq. 14 sees nothing.
2. Equal answers: Algorithm 1 drops copies before its first pass, and with them how often the policy writes an answer, so that
   what it accepts is no sample of pi_r where answers are short. Here every draw is a candidate, as in section 3.2, and copies
   leave when one of them is accepted. No difference where all answers differ. Where fewer than --accepted differ, all are
   taken, even bad ones (Algorithm 1 would fail).
3. first-round pairs the accepted at random, n/2 pairs. tournament (SLiC's) lets the winners meet, n-1 pairs: higher rewards,
   but not better answers in the paper. Two equal scores make no pair. A pair weighs the same, however many its prompt has.
4. The reference stays fixed, samples are drawn once, before training: one round. --model with the trained folder is another.
   They are kept in --cache-dir: another --sampling-beta, --accepted, --ranking or --gamma finds them there.
5. An answer that was cut (it has no end by --max-length) is accepted like any other: what it is worth is up to --reward.
6. AdamW, where the paper has Adafactor; and no checkpoint is picked by the ranker's win rate: the last one counts.

Healthy (the lines `accepted`, before training): several times as many different answers as --accepted, else nearly all are taken
and the rejection step does nothing: raise --samples or --temperature. Then the accepted score better than the sampled: hardly
better, lower --sampling-beta. The loss starts at ln 2 = 0.6931 (sigmoid-norm) or 1 (hinge-norm); rewards/accuracies rises from
0 (no margin yet; `tiny`: to 0.86, its answers a quarter longer than before). Rewards that rise while the text gets worse are over-optimisation of what scores: raise --gamma.

    python rso.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 rso.py --model runs/sft-model-gemma-2-2b --reward runs/reward_model-...   # a folder of reward_model.py
    python rso.py --model runs/sft-... --dataset rows.jsonl --reward mine.py:score   # {"prompt"}; score(prompts, responses) -> list of floats

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

import gc
import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

import common
import generation
import samples
import scoring

HELD_OUT_PROMPTS = 256  # of the held-out ones: each is sampled from as often as one to train on

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
SETTINGS = {
    "tiny": {
        "sampling_beta": 0.1, "gamma": 1.0, "samples": 16, "accepted": 4, "temperature": 1.0, "top_k": 0,
        "reward": "tiny-preferred@tiny", "prompts": 2000, "lr": 2e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 176, "max_prompt_length": 160, "dataset": "family", "source": "tuned here",
    },
    "t5-large": {  # an encoder-decoder, which does not run here: for models without a row. beta, gamma, samples, accepted,
        # temperature, top_k, lr and batch are the paper's, the rest ours, as for TL;DR in slic.py
        "sampling_beta": 0.5, "gamma": 0.05, "samples": 64, "accepted": 8, "temperature": 0.7, "top_k": 40,
        "lr": 1e-5, "batch_size": 32, "micro_batch_size": 8, "epochs": 1.0,
        "schedule": "constant", "warmup_ratio": 0.1, "optimizer": "adamw", "max_grad_norm": 10.0,
        "max_length": 512, "max_prompt_length": 256, "dataset": "tldr",
        "source": "sampling, gamma, lr, batch: Liu et al. 2023, section 5; the rest is ours",
    },
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # RSO
    reward: str | None = None  # what scores answers: a reward model's folder or hub id, two language models a@b, family (the true reward), or file.py:function; default: the model's row in SETTINGS
    prompts: int | None = None  # so many prompts, drawn at random, are sampled from; default: SETTINGS, else all
    samples: int | None = None  # answers a prompt that are sampled and scored; default: SETTINGS
    temperature: float | None = None  # of the samples; default: SETTINGS
    top_k: int | None = None  # only the so many likeliest tokens are sampled, 0: all; default: SETTINGS
    sampling_beta: float | None = None  # temperature of the rejection step, in units of the reward; 0: the best are accepted, inf: any; default: SETTINGS
    accepted: int | None = None  # of them at most so many become pairs, 2 or more; default: SETTINGS
    ranking: Literal["first-round", "tournament"] = "first-round"  # how the accepted become pairs: at random, or winners meet again
    gamma: float | None = None  # temperature of the loss, per nat; default: SETTINGS
    loss: Literal["sigmoid-norm", "hinge-norm", "hinge"] = "sigmoid-norm"  # on a pair; -norm: log-probs less those of the reference
    # The reference
    ref_model: str | None = None  # reference model, or a soup a+b of two; default: the policy before its first step
    soup_weight: float = 0.5  # weight of the first model of a soup, in [0, 1]
    # Model and data
    model: str = "tiny"  # tiny, a short name (gemma-2-2b, ...), a Hugging Face id, or a folder such as runs/sft
    dataset: str | None = None  # family, a short name (tldr, ultrafeedback, hh, ...), a file or folder (.jsonl .json .parquet .csv), a hub id[:config][:split], or name=PATH for a copy; default: SETTINGS
    eval_dataset: str | None = None  # held-out rows; default: the dataset's own test split, else a twentieth of it
    skip_bad_rows: bool = False  # go on without rows that cannot be used, instead of stopping
    max_length: int | None = None  # tokens of prompt and response together; default: SETTINGS
    max_prompt_length: int | None = None  # tokens kept of a prompt whose row is too long; default: SETTINGS
    # Optimization
    batch_size: int | None = None  # rows (a prompt and its responses) per optimizer step, over all processes; default: SETTINGS
    micro_batch_size: int | None = None  # rows per forward pass and process; default: the largest that fits SETTINGS
    epochs: float | None = None  # passes over the rows; default: SETTINGS
    max_steps: int | None = None  # optimizer steps, instead of epochs; default: SETTINGS
    lr: float | None = None  # peak learning rate; default: SETTINGS
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] | None = None  # after the warm-up; default: SETTINGS
    warmup_ratio: float | None = None  # share of the steps in which the learning rate rises from 0; default: SETTINGS
    optimizer: Literal["adamw", "rmsprop"] | None = None  # default: SETTINGS
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float | None = None  # gradients are scaled down to this norm; 0: never; default: SETTINGS
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # to compute in; default: bfloat16 on GPUs that have it, else float32
    attn: Literal["auto", "eager", "sdpa", "flex_attention"] = "auto"  # attention; auto: sdpa, or eager where sdpa would leave something out
    share_prompt: bool = True  # the responses of a prompt stand behind one copy of it, where that costs less
    fused_logps: bool = True  # log-probs through kernels/, which never hold the logits; off: the plain lines in common.py
    fsdp: bool = False  # weights, gradients and optimizer state are spread over the processes
    gradient_checkpointing: bool = False  # activations are made again in the backward pass: less memory, one more forward pass
    compile: bool = False  # torch.compile of the layers: the first steps take long, what the others gain is not measured yet
    lora_rank: int | None = None  # train adapters of this rank beside the frozen linear layers (LoRA, alpha twice the rank); 0: train all weights; default: SETTINGS, else 0
    # The run
    output_dir: str | None = None  # default: runs/<script> plus the flags that differ from their defaults
    resume: Literal["auto", "never"] = "auto"  # auto: go on where the folder's run stopped; never: a new numbered folder
    eval_every: int = 100  # steps between evaluations on held-out rows; 0: only at the start and the end
    sample_every: int = 0  # steps between greedy samples on fixed prompts; 0: only at the start and the end
    save_every: int = 100  # steps between checkpoints; 0: only at the end
    keep_last: int = 1  # checkpoints kept
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the saved model
    cache_dir: str | None = None  # where tokens, samples and log-probs of a reference are kept for the next run; default: runs/.cache
    track: Literal["none", "wandb", "tensorboard"] = "none"  # send the metrics there too
    seed: int = 0  # of the order of rows, and of whatever is sampled
    deterministic: bool = False  # refuse operations that are not bit for bit reproducible (slower on GPUs)
# fmt: on


def rejection_sample(
    scores: list[float],  # of what pi_sft has drawn, in that order
    n: int,
    beta: float,
    rng: np.random.Generator,
    answers: list[str] | None = None,  # equal ones leave together; default: no two are equal
) -> list[int]:
    """Algorithm 1: indexes of at most n answers, no two equal, in the order of acceptance."""
    answers = answers or [str(i) for i in range(len(scores))]
    remaining, accepted, there = list(range(len(scores))), [], set()
    while remaining and len(accepted) < n:
        best = max(scores[i] for i in remaining)  # for a whole pass, which accepts it at the latest
        for i in remaining:
            gap = scores[i] - best  # 0 or less, so exp cannot overflow
            chance = math.exp(gap / beta) if beta else float(gap == 0)
            if rng.random() < chance and answers[i] not in there:
                accepted.append(i)
                there.add(answers[i])
            if len(accepted) == n:
                break
        remaining = [i for i in remaining if answers[i] not in there]
    return accepted


def pair_up(scores: list[float], ranking: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Indexes (winner, loser) of every game that has a winner: one round of random games, or rounds
    until one player is left.
    """
    players, pairs = rng.permutation(len(scores)).tolist(), []
    while len(players) > 1:
        winners = players[len(players) // 2 * 2 :]  # an odd one; it plays first in the next round
        for a, b in zip(players[0::2], players[1::2], strict=False):
            winners.append(a if scores[a] >= scores[b] else b)  # a draw: any, for places are random
            if scores[a] != scores[b]:
                pairs.append((a, b) if winners[-1] == a else (b, a))
        players = winners if ranking == "tournament" else []
    return pairs


def rso_loss(
    chosen_logps: Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    ref_chosen_logps: Tensor,  # (B,) the same under pi_sft
    ref_rejected_logps: Tensor,  # (B,)
    gamma: float,
    loss: str = "sigmoid-norm",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equations 8 to 10. Returns one loss per pair, and what to plot (one value per pair)."""
    chosen_rewards = gamma * (chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = gamma * (rejected_logps - ref_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    losses = {
        "sigmoid-norm": -F.logsigmoid(margins),
        "hinge-norm": F.relu(1 - margins),
        "hinge": F.relu(1 - gamma * (chosen_logps - rejected_logps)),  # no reference in it
    }[loss]
    metrics = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses, metrics


def pairs_of(
    sampled: list[samples.Sampled],
    n: int,  # accepted a prompt
    beta: float,
    ranking: str,
    seed: tuple[int, int],  # what is drawn for a prompt depends on this and its number alone
    tokenizer: Any,
    label: str,
) -> list[common.Row]:
    """Rows of two responses and their scores, chosen first: every prompt's first pair, then the
    second ones. Says what became of the samples.
    """
    pairs: list[list[common.Row]] = []  # of every prompt
    counts, scores = [], []
    for i, made in enumerate(sampled):
        rng = np.random.default_rng([seed[0], i, seed[1]])
        once = {ids.tobytes(): ids for ids in made.responses}  # most are written more than once
        texts = {key: generation.text_of(ids, tokenizer) for key, ids in once.items()}
        answers = [texts[ids.tobytes()] for ids in made.responses]
        taken = rejection_sample(made.scores.tolist(), n, beta, rng, answers)
        games = pair_up(made.scores[taken].tolist(), ranking, rng)
        pairs.append([])
        for both in ([taken[winner], taken[loser]] for winner, loser in games):
            responses = [made.responses[k] for k in both]
            row = common.Row(made.prompt, responses, made.prompt, made.scores[both])
            pairs[-1].append(row)
        counts.append((len(set(answers)), len(taken), len(games)))
        scores += made.scores[taken].tolist()
    # So that rows that stand together, such as those that samples are shown of, have different
    # prompts.
    rows = [row for turn in zip_longest(*pairs) for row in turn if row]
    if sampled:
        told = "a prompt {:.1f} different answers, {:.1f} accepted, {:.1f} pairs; ".format(
            *np.mean(counts, 0)
        )
        common.say(label, told + f"{len(rows):,} pairs of {len(sampled):,} prompts")
        means = [np.mean([made.scores for made in sampled]), np.mean(scores)]
        means += np.mean([row.scores for row in rows], 0).tolist() if rows else [math.nan] * 2
        told = "mean score: sampled {:.3f}, accepted {:.3f}, chosen {:.3f}, rejected {:.3f}"
        common.say("", told.format(*means))
    return rows


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.sampling_beta >= 0 or not args.gamma > 0:
        raise common.UserError("--sampling-beta must be 0 or more, --gamma positive")
    if not args.temperature > 0 or not args.top_k >= 0:
        raise common.UserError("--temperature must be positive, --top-k 0 or more")
    if not 2 <= args.accepted <= args.samples:
        raise common.UserError("--accepted must be 2 or more, and --samples at least as many")
    if args.prompts is not None and args.prompts < 1:
        raise common.UserError("--prompts must be 1 or more")
    if not args.reward:
        raise common.UserError("--reward: what scores the answers? A folder of reward_model.py")
    scoring.check_reward(args.reward)
    common.check_reference(args.ref_model, args.soup_weight)
    run.check_batch()  # before hours of sampling
    run.reward_scale = args.gamma
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "prompt", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
    )  # fmt: skip
    order = np.random.default_rng(args.seed).permutation(len(train))[: args.prompts]
    train.rows, held_out.rows = [train.rows[i] for i in order], held_out.rows[:HELD_OUT_PROMPTS]
    run.lengths = [args.max_length]  # what a row may have: the model is tried at that
    policy = common.load_policy(
        args.model, args.dtype, run, args.attn, args.share_prompt, args.fused_logps,
        args.fsdp, args.gradient_checkpointing, args.compile, args.lora_rank,
    )  # fmt: skip
    common.warn_if_not_fine_tuned(policy, tokenizer)

    # Sample, score, accept: the policy is pi_sft here, also where the run goes on from a checkpoint.
    reward = scoring.load_reward(args.reward, tokenizer, run, args.dtype, args.attn, args.fsdp)
    facts = common.from_main(
        lambda: samples.facts_of(args.model, args.reward, args.dtype, args.attn, args.lora_rank)
    )
    for i, (rows, name) in enumerate(((train, "sampled"), (held_out, "sampled-held-out"))):
        prompts = [row.prompt for row in rows.rows]
        sampled = prompts and samples.sample_and_score(
            policy, prompts, tokenizer, reward, run, args.cache_dir, facts, args.samples,
            args.max_length - args.max_prompt_length, args.temperature, args.top_k,
            seed=common.hash_of(args.seed, i), label=name,
        )  # fmt: skip
        rows.rows = pairs_of(
            sampled, args.accepted, args.sampling_beta, args.ranking, (args.seed, i + 1),
            tokenizer, ("accepted", "held out")[i],
        )  # fmt: skip
    if common.MAIN_PROCESS:
        samples.write_pairs(run.folder / "accepted.jsonl", train.rows, tokenizer)
    del reward  # before the optimizer comes
    gc.collect()

    run.plan(train)
    common.add_reference_logps(
        run, train, held_out, policy, args.ref_model, args.soup_weight, args.cache_dir
    )
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = common.response_logps(policy, micro)  # (B, 2), (B, 2)
        ref_logps = micro.ref_logps.to(logps.dtype)  # (B, 2)
        losses, metrics = rso_loss(*logps.unbind(1), *ref_logps.unbind(1), args.gamma, args.loss)
        metrics |= {"length/chosen": lengths[:, 0], "length/rejected": lengths[:, 1]}
        return losses, metrics

    for batch in run.batches(train):  # from where the run stands
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, policy, tokenizer)
        for micro in batch:
            losses, metrics = losses_of(micro)
            # Divided by the whole step's count, over all processes.
            (losses.sum() / batch.prompts).backward()
            run.add(metrics)
        # Sums gradients over processes, clips, steps, logs, saves when due.
        run.update(policy, optimizer)
    run.evaluate(losses_of, held_out, policy, tokenizer)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
