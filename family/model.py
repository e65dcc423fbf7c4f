"""Tokenizer and model of the embedded task: byte-level, every word of its vocabulary a token."""

from family.task import NAMES, RELATIONS

SPLIT = r" ?[A-Za-z]+|[^A-Za-z]"  # no \s or \w: two regex engines must agree on any Unicode text
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
WORDS = sorted(
    {*"child parent and Who is are the of".split(), *NAMES, *" ".join(RELATIONS).split()}
)
TEMPLATE = (  # turns follow each other without markers; an answer ends with its end token
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def encoding():
    """The tiktoken encoding."""
    import tiktoken

    words = [b"Family", *(f" {word}".encode() for word in WORDS)]
    tokens = [bytes([byte]) for byte in range(256)] + words
    return tiktoken.Encoding(
        "plainpref-family",
        pat_str=SPLIT,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={token: len(tokens) + i for i, token in enumerate(SPECIAL)},
    )


def hf_tokenizer():
    """The same encoding as a Hugging Face tokenizer, with equal ids for any text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    source = encoding()
    ranks = {source.decode_single_token_bytes(i): i for i in range(source.n_vocab - len(SPECIAL))}
    visible = bytes_to_unicode()  # how byte-level vocabularies spell a byte
    spelled = {token: "".join(visible[byte] for byte in token) for token in ranks}
    # tiktoken uses a piece as one token if it is one; otherwise it merges neighbours whose
    # concatenation is a token, lowest rank first. In BPE terms: each split of each token into two
    # tokens is a merge, in the order of ranks.
    merges = [
        (spelled[token[:at]], spelled[token[at:]])
        for token in ranks
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    pieces, bytes_of = Split(Regex(SPLIT), "isolated"), ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([pieces, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    bos, eos, pad = SPECIAL
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, source.encode_single_token(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def untrained_model():
    """A Llama of about a million parameters, with random weights from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = encoding()
    bos, eos, pad = (vocabulary.encode_single_token(token) for token in SPECIAL)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary.n_vocab,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,  # the usual 0.02 takes much longer to learn to copy names
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        )
    )
