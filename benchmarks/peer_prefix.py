"""The worker of `peers.py` for PrefixGrouper: transformers, PEFT and TRL's loss, with each prompt read once.

The package (https://github.com/johncaged/PrefixGrouper) puts a prompt and its G completions into one row, and calls
attention twice: the prompt's tokens among themselves, then each completion's tokens, which see the prompt's too. Its
own registration with transformers knows causal masks only; here each call gets its part of Gemma 3's masks.
"""

import torch
from prefix_grouper import PrefixGrouper
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask
from trl import GRPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from benchmarks import peer_job as common
from benchmarks.peer_torch import bare_trainer, load_adapted, load_model, take_updates

NAME = "prefix_grouper"


def grouped_attention(module, query, key, value, attention_mask, *, prefix_grouper: PrefixGrouper, **settings):
    """transformers' attention on rows of a prompt and its completions.

    attention_mask: bool[Q, 1, P + C, P + C], that of a prompt and any one of its completions, as none is padded.
    """

    def attend(query, key, value, padding):
        queries, keys = query.shape[2], key.shape[2]  # P and P of the prompts, C and P + C of the completions
        mask = attention_mask[:, :, keys - queries : keys, :keys]
        mask = mask.repeat_interleave(len(query) // len(mask), dim=0)
        return sdpa_attention_forward(module, query, key, value, mask, **settings)[0]

    return prefix_grouper.forward(attend, query, key, value), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class GroupedTrainer(GRPOTrainer):
    """TRL's trainer, which repeats each prompt G times, with log-probs from rows in which each prompt stands once."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, pixel_values=None, token_type_ids=None, **unused
    ):
        """Log-probs and entropies, float[Q * G, C], and no auxiliary loss.

        The logits are kept for the backward pass: TRL's fused head, which computes them twice, is slower here.
        """
        group, length = self.num_generations, logits_to_keep
        one_each = input_ids[::group]  # each prompt with its first completion
        prompts, completions = one_each[:, :-length], input_ids[:, -length:]
        prompt_mask, completion_mask = torch.ones_like(prompts), torch.ones_like(completions)
        grouper = PrefixGrouper.from_ungrouped_masks(prompt_mask, completion_mask, group, device=input_ids.device)

        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = torch.cat([positions[:-length], positions[-length:].repeat(group)])
        types = torch.zeros_like(one_each) if token_type_ids is None else token_type_ids[::group]
        base = model.get_base_model()
        masks = create_masks_for_vision_model(
            base.config.get_text_config(),
            inputs_embeds=torch.empty((*one_each.shape, 0), device=input_ids.device),
            attention_mask=None,
            past_key_values=None,
            position_ids=None,
            block_sequence_ids=get_block_sequence_ids_for_mask(types),
        )
        images = {} if pixel_values is None else {"pixel_values": pixel_values[::group]}
        hidden = base.base_model(
            input_ids=grouper.concat_input(prompts, prompt_mask, completions, completion_mask),
            attention_mask=masks,
            position_ids=positions[None].expand(len(prompts), -1),
            use_cache=False,
            prefix_grouper=grouper,
            **images,
        ).last_hidden_state
        # float[Q * G, C, D]: the prompt's last token predicts the first token of every completion
        hidden = grouper.split_output(hidden, include_prefix_last=1)[2][:, :-1]
        logits = base.get_output_embeddings()(hidden)
        return selective_log_softmax(logits, completions), entropy_from_logits(logits.detach()), None


def main() -> None:
    job = common.read_job()
    model = load_model(job)
    model.get_decoder().set_attn_implementation(NAME)
    take_updates(job, bare_trainer(GroupedTrainer, job, load_adapted(job, model)))


if __name__ == "__main__":
    main()
