"""What every step of training needs and does not change."""

from dataclasses import dataclass

import jax

from gemma3.lora import Policy
from gemma3.params import Params
from gemma3.sample import PromptBatch
from grpo.reader import Reader
from grpo.run.settings import Settings
from grpo.update import Learner, Trainable, completion_logps, policy_of
from reward import RewardFunction


@dataclass(frozen=True)
class Trainer:
    settings: Settings
    reader: Reader  # the model, its tokenizer, and how an example becomes a prompt
    frozen: Params  # with an adapter, the whole base model; without, only what the reference or the policy needs
    learner: Learner
    reward: RewardFunction

    @property
    def reference(self) -> Policy:
        """The policy that training started from. With an adapter, it shares the weights of the policy in training."""
        return Policy(self.frozen)

    def policy(self, trainable: Trainable) -> Policy:
        return policy_of(trainable, self.frozen, self.learner.dtype)

    def keeps_pixels(self, policy: Policy) -> bool:
        """Whether an update runs the vision tower again."""
        return self.settings.train_vision or (policy.lora is not None and policy.lora.vision is not None)

    def logps(self, policy: Policy, prompts: PromptBatch, completion_ids: jax.Array) -> jax.Array:
        """The log-probs of completions under some policy, float32[Q, G, C]."""
        learner = self.learner
        how = {"model": learner.model, "temperature": learner.temperature, "micro_batch": learner.micro_batch}
        return completion_logps(policy, prompts, completion_ids, **how)
