"""RLOO: REINFORCE with a leave-one-out baseline. Ahmadian, Cremer, Gallé, Fadaee, Kreutzer, Pietquin,
Üstün, Hooker; 2024; arXiv 2402.14740.

    R_i  = score(x, y_i) - beta ( log pi_old(y_i|x) - log ref(y_i|x) )           reward of a whole response
    A_i  = R_i - 1/(k-1) sum over j != i of R_j                  compared with the k - 1 others to its prompt
    L    = - E_i [ A_i log pi(y_i|x) ]                           REINFORCE: the loss with one update a batch
    here - E_i [ min( rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i ) ],  rho_i = pi(y_i|x) / pi_old(y_i|x)

Sample k responses to a prompt, score them, and raise the probability of each in proportion to how
much more reward it got than the others. PPO learns the expected reward with a value network; here
the other responses estimate it. They were drawn independently, so as a baseline they make the
gradient less noisy and do not bias it. A whole response is one action: all of its tokens share one
advantage and its KL is one number. There is no value network, discount, GAE or whitening: the paper
finds that a policy that starts at a fine-tuned model does not need them.

    paper                    here
    x, y_i, k                a prompt; a response sampled by the policy; samples (group size)
    pi, pi_old, ref          logps, old_logps, ref_logps: (B, T), per token, at the sampling temperature
    score, R                 scores, (N,): what --reward gives to a whole response; objective/rlhf_reward
    beta                     kl_coef
    A                        advantages, (N,): leave_one_out()
    eps                      clip_range
    E_i                      mean over the responses of a minibatch, over all processes

The baseline is that of Kool, van Hoof, Welling 2019, "Buy 4 REINFORCE samples, get a baseline for
free!". `--ref-model a+b` makes the reference the weight average of two models (SALSA, see ppo.py).

Departures
1. In the first update of a batch the ratio rho is 1 and both losses have the same gradient. In
   further ones (--minibatches, --batch-epochs) the ratio corrects for the responses being old, and
   a response past the clip gets no more gradient, as in TRL. The paper takes two steps a batch,
   finds that clipping hardly matters in PPO, and has none here: --clip-range 1e9 comes near to that.
2. Advantages of a group sum to 0, and so does the loss of one update: watch objective/scores.
3. A response without an end after --max-length - --max-prompt-length tokens scores
   -missing_eos_value (`subtract`: its own score less that), as in ppo.py. The paper has no such rule.
4. pi_old is computed by the forward pass of training, not kept from sampling: ratios of the first
   minibatch are 1. A warning appears above 0.01 a token.
5. --batch-size counts prompts; a step has `samples` times as many responses. --micro-batch-size
   counts responses: a group may be split, its advantages are computed before.

Healthy: objective/scores and objective/kl rise (`tiny`: to 2 nats a response of 4 tokens in the first
10 of 30 steps), then both stay; objective/entropy falls (`tiny`: from 2.6 to 1.1 nats). With one
update a batch the loss and policy/clipfrac are 0. With several, clipfrac counts whole responses and
grows with their length: above 0.3, take fewer updates. If an alarm is printed (KL, length,
entropy), read rollouts.jsonl. If scores rise while objective/gold falls, the reward is being
cheated: raise --kl-coef or stop earlier.

    python rloo.py                         # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 rloo.py --fsdp --model runs/sft-gemma-2-2b --reward runs/reward_model-...
    python rloo.py --model runs/sft-... --dataset rows.jsonl --reward judge.py:score   # {"prompt"}; score(prompts, responses) -> numbers

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import common
from sampling.rollouts import Online, Rollout, check_args, per_response


@dataclass
class Args(common.Args):
    reward: str | None = None  # a reward model, a@b (log-ratio of two), family, or file.py:function
    gold_reward: str | None = None  # another, only measured on held-out prompts; none: off
    samples: int = 4  # k, responses to a prompt
    kl_coef: float = 0.03  # beta, per nat
    temperature: float = 1.0  # of sampling, and of all log-probs
    sample_batch_size: int | None = None  # answers sampled at once; default: what memory allows
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"  # score of an unended response
    missing_eos_value: float = 1.0  # replace: it scores minus this; subtract: its own less this
    batch_epochs: int = 1  # passes over the responses of a step
    minibatches: int = 2  # optimizer updates in each of these passes
    clip_range: float = 0.2  # how far the ratio of a whole response may go from 1
    adam_eps: float = 1e-8  # AdamW's epsilon
    ref_model: str | None = None  # reference, or a soup a+b of two; default: the initial policy
    soup_weight: float = 0.5  # weight of the first model of a soup
    dataset: str | None = "tldr"  # family, a short name, a file, a folder, or a hub id
    batch_size: int = 128  # prompts per step, over all processes
    micro_batch_size: int = 8  # responses per forward pass and process
    max_steps: int | None = 600  # batches of responses, each with several updates
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"  # after warm-up
    warmup_ratio: float = 0.03  # share of the steps during which the learning rate rises
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 448  # tokens kept of the prompt; the others are the response's


PRESETS = {
    "tiny": dict(  # tuned here
        dataset="family", reward="tiny-preferred@tiny", gold_reward="family", kl_coef=0.1,
        minibatches=1, lr=1e-3, schedule="linear", warmup_ratio=0.05, batch_size=32,
        micro_batch_size=32, max_steps=30, max_length=176, max_prompt_length=160,
    ),
    # The defaults: Ahmadian et al. 2024, appendix on training, TL;DR. 512 responses a batch, 256
    # an update. Temperature, Adam's epsilon and gradient norm are ours.
    "pythia-6.9b": dict(),
    # "Putting RL back in RLHF", huggingface.co/blog, June 2024: its command for this model, on 8
    # processes. A million responses, 4,096 a batch, 2,048 an update; their trainer clips no
    # gradients. Length of prompts and responses as in ppo.py.
    "pythia-1b": dict(
        samples=2, batch_epochs=2, temperature=0.7, adam_eps=1e-5, lr=3e-6, schedule="linear",
        warmup_ratio=0.0, max_grad_norm=0.0, batch_size=2048, max_steps=244, max_length=565,
        max_prompt_length=512,
    ),
}  # fmt: skip


def leave_one_out(rewards: torch.Tensor, samples: int) -> torch.Tensor:
    """(N,) each less the mean of the others of its group: `samples` consecutive rewards."""
    groups = rewards.view(-1, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()


def rloo_loss(
    logps: torch.Tensor,  # (B, T) log pi of every response token
    old_logps: torch.Tensor,  # (B, T) the same when the responses were sampled
    advantages: torch.Tensor,  # (B,)
    mask: torch.Tensor,  # (B, T) bool
    clip_range: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One loss per response, and metrics (one value per response)."""
    log_ratios = logps.masked_fill(~mask, 0.0) - old_logps.detach().masked_fill(~mask, 0.0)
    log_ratios = log_ratios.sum(1)  # (B,) of whole responses
    ratios, advantages = torch.exp(log_ratios), advantages.detach()
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.max(-advantages * ratios, -advantages * clipped)
    metrics = {
        "loss": losses,
        "policy/clipfrac": (-advantages * clipped > -advantages * ratios).to(logps.dtype),
        "policy/approxkl": 0.5 * log_ratios**2,
        "val/ratio": ratios,
    }
    return losses, metrics


def main(args: Args) -> None:
    check_args(args, positive="temperature batch_epochs minibatches clip_range adam_eps")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="prompt")
    run.plan(train, args.minibatches, args.samples)
    online = Online(args, run, tokenizer)
    policy = online.policy
    optimizer, scheduler = common.make_optimizer(policy, args, run, args.adam_eps)
    run.restore(policy, optimizer, scheduler)

    def roll_out(prompts: list, samples: int, step: int) -> Rollout:
        rollout = online.sample(prompts, samples, step)  # 1. Sample
        rollout.scores = online.final_scores(rollout)  # 2. Score
        rollout.logps, rollout.ref_logps = online.logps(rollout, args.temperature)  # 3. Log-probs
        return rollout

    def metrics_of(rollout: Rollout) -> dict[str, torch.Tensor]:
        return rollout.metrics(args.kl_coef)

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            online.evaluate(held_out, roll_out, metrics_of)
        prompts = [train[i].prompt for i in sorted(step.rows)]
        rollout = roll_out(prompts, args.samples, run.step)

        # 4. Rewards and advantages.
        metrics = metrics_of(rollout)
        advantages = leave_one_out(metrics["objective/rlhf_reward"], args.samples)
        run.record(metrics)
        online.watch(rollout, advantage=advantages)

        # 5. Update, once or several times.
        for number, micro_batches in enumerate(online.minibatches(rollout, args.batch_epochs)):
            num_responses = sum(map(len, micro_batches))  # over all processes
            for indexes in micro_batches[run.rank :: run.world]:
                batch = online.collate(rollout.rows, indexes)
                logps = per_response(policy(batch, args.temperature), batch)  # (B, T)
                mask, old_logps, A = rollout.part(indexes, logps, rollout.logps, advantages)
                losses, metrics = rloo_loss(logps, old_logps, A, mask, args.clip_range)
                (losses.sum() / num_responses).backward()
                run.record(metrics)
                if number == 0:
                    online.check_ratios(logps, old_logps, mask)
            common.sum_gradients(policy)  # a sum, not a mean: the loss is already divided
            grad_norm = common.clip_gradients(policy, args.max_grad_norm)
            if grad_norm.isfinite():  # equal on all processes
                optimizer.step()
            else:
                run.saw_nonfinite = True  # one update of the step is skipped
            optimizer.zero_grad()
        scheduler.step()
        run.end_step(grad_norm)
    online.evaluate(held_out, roll_out, metrics_of)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
