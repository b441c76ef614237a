"""The files of a tokenizer in a checkpoint, as patterns of their names; a bundle contains them."""

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.jinja")
