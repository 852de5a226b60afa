"""MiniCPM for transformers: the network, generation, and `chat`.

Written by the `minicpm` package (Apache-2.0). Needs only torch and transformers (4.57 or 5), and runs everywhere
that PyTorch does: attention goes through `scaled_dot_product_attention`, which picks the kernel. Rotary angles,
norm statistics, softmax and logits are float32 whatever the dtype. Attention weights are not returned.
"""

import math
import re
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_minicpm import MiniCPMConfig

NEXT_TURN = re.compile("<AI>|<用户>")


def rotate(x, cos, sin):
    """Turn `x` (batch, heads, length, head_dim), halves paired, in float32; the dtype stays."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def attention_mask_4d(attention_mask, num_new, num_keys, past, device):
    """Return which keys each new position sees, bool (batch or 1, 1, new, keys).

    A two-dimensional mask names the real tokens; a four-dimensional one (static caches) is taken as it is.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    rows = torch.arange(past, past + num_new, device=device)[:, None]
    columns = torch.arange(num_keys, device=device)[None]
    mask = (columns <= rows)[None, None]
    if attention_mask is not None:
        real = attention_mask[:, None, None, :num_keys].to(device=device, dtype=torch.bool)
        real = F.pad(real, (0, num_keys - real.shape[-1]))
        # A padded position sees itself: a row without any key has no softmax.
        return (mask & real) | (columns == rows)
    return mask


class MiniCPMRMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast back before the weight."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Return `x` normed."""
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight


class MiniCPMAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config, layer_idx):
        super().__init__()
        width, self.head_dim, self.layer_idx = config.hidden_size, config.head_dim, layer_idx
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)
        self.scale = config.attention_multiplier or self.head_dim**-0.5

    def forward(self, x, cos, sin, attention_mask, past_key_values, past):
        """Return (batch, length, hidden)."""
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        num_keys = k.shape[2]
        is_causal = attention_mask is None and past == 0 and num_keys == length
        is_last = attention_mask is None and length == 1 and num_keys == past + 1
        mask = None
        if not (is_causal or is_last):
            mask = attention_mask_4d(attention_mask, length, num_keys, past, x.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal and length > 1, scale=self.scale, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MiniCPMMLP(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        """Return (batch, length, hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MiniCPMDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each scaled before it joins the residual stream."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MiniCPMAttention(config, layer_idx)
        self.post_attention_layernorm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MiniCPMMLP(config)
        self.residual_scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, hidden_states, cos, sin, attention_mask, past_key_values, past):
        """Return the next residual stream."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, cos, sin, attention_mask, past_key_values, past)
        hidden_states = hidden_states + attended * self.residual_scale
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.residual_scale


class MiniCPMPreTrainedModel(PreTrainedModel):
    """What the two models below share with transformers."""

    config_class = MiniCPMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MiniCPMDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module):
        # Through torch.nn.init, which transformers guards: weights that came from a file are left alone.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            is_head = module is getattr(self, "lm_head", None)
            width = 1.0 if is_head else self.config.hidden_size / self.config.dim_model_base
            nn.init.normal_(module.weight, mean=0.0, std=std / math.sqrt(width))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, MiniCPMRMSNorm):
            nn.init.ones_(module.weight)


class MiniCPMModel(MiniCPMPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MiniCPMDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Return the normed hidden states; `inputs_embeds` are used unscaled, as they are."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * self.config.scale_emb
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        h, length = inputs_embeds, inputs_embeds.shape[1]
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=h.device)[None]
        if attention_mask is not None and attention_mask.ndim == 2 and bool(attention_mask.all()):
            attention_mask = None
        rates = torch.tensor(self.config.rope_frequencies(past + length), dtype=torch.float32, device=h.device)
        angles = position_ids[:, None, :, None].to(device=h.device, dtype=torch.float32) * rates
        cos, sin = angles.cos(), angles.sin()
        states = []
        for layer in self.layers:
            states.append(h)
            h = layer(h, cos, sin, attention_mask, past_key_values, past)
        h = self.norm(h)
        output = BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, h) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output


class MiniCPMForCausalLM(MiniCPMPreTrainedModel, GenerationMixin):
    """MiniCPM with its head, for generation, training and chat."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = MiniCPMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return float32 logits, of the last `logits_to_keep` positions or all, and the loss where labels are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(hidden / (self.config.hidden_size / self.config.dim_model_base)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        past, states = outputs.past_key_values, outputs.hidden_states
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past, hidden_states=states)
        return output.to_tuple() if return_dict is False else output

    @torch.inference_mode()
    def chat(
        self,
        tokenizer,
        query,
        history=None,
        role="user",
        max_length=4096,
        num_beams=1,
        do_sample=True,
        top_p=0.8,
        temperature=0.3,
        logits_processor=None,
        **kwargs,
    ):
        """Return the answer to `query` and the conversation with it; the given history is not changed.

        Args:
            tokenizer: with the model's chat template.
            query: what is said now, by `role`.
            history: earlier messages, dictionaries of `role` and `content`.
            role: `user` or `system`.
            max_length: of prompt and answer, in tokens; `max_new_tokens` in `kwargs` takes its place.
            num_beams: of beam search.
            do_sample: draw, with `top_p` and `temperature`; otherwise the most likely answer.
            top_p: probability mass that is drawn from.
            temperature: below 1 is more certain.
            logits_processor: a list for `generate`.
            kwargs: any other setting of `generate`.
        """
        history = [dict(message) for message in history or []] + [{"role": role, "content": query}]
        prompt = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=False)
        settings = {"num_beams": num_beams, "do_sample": do_sample, "logits_processor": logits_processor}
        if "max_new_tokens" not in kwargs:
            settings["max_length"] = max_length
        if do_sample:
            settings.update(top_p=top_p, temperature=temperature)
        settings.update(kwargs)
        ends = settings.get("eos_token_id", self.generation_config.eos_token_id) or self.config.eos_token_id
        ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
        settings.setdefault("pad_token_id", tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends))
        # Where the template needs no control tokens, one that somebody typed ("</s>") stays plain text.
        is_plain = not any(token in str(tokenizer.chat_template) for token in tokenizer.all_special_tokens)
        inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=is_plain)
        inputs = {key: value.to(self.device) for key, value in inputs.items() if key != "token_type_ids"}
        answer = self.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
        while answer and answer[-1] in ends:
            answer.pop()
        # A model that goes on with the next turn by itself is cut there.
        response = NEXT_TURN.split(tokenizer.decode(answer), maxsplit=1)[0]
        return response, [*history, {"role": "assistant", "content": response}]
