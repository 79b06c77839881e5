"""SGLang's mistral, which is its llama, without the vision models that its file imports."""

from sglang.srt.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """As SGLang's own."""


EntryClass = MistralForCausalLM
