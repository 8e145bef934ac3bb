"""Where texts begin and end: what the files beside a tokenizer say, and no guess."""

import json

import pytest
import tokenizers
from tokenizers import processors

from jmoe.data import corpus, text
from jmoe.data.special_tokens import GENERATION, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from jmoe.data.tokenizer import FILE, Tokenizer

BEGIN, END, TURN = "<|begin|>", "<|endoftext|>", "<|turn|>"
VOCABULARY = {"cat": 0, "mat": 1, BEGIN: 2, END: 3, TURN: 4}
OPENS = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 2)])


def write(directory, sidecars, post_processor=None):
    """A tokenizer of words, and the files beside it."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.save(str(directory / FILE))
    for name, content in sidecars.items():
        (directory / name).write_text(json.dumps(content))
    return directory / FILE


@pytest.mark.parametrize(
    "sidecars, eos, stops",
    [
        ({}, 3, (3,)),
        ({TOKENIZER_CONFIG: {"eos_token": TURN}}, 4, (4,)),
        ({TOKENIZER_CONFIG: {"eos_token": {"content": TURN}}}, 4, (4,)),
        ({SPECIAL_TOKENS_MAP: {"eos_token": TURN}}, 4, (4,)),
        ({GENERATION: {"eos_token_id": 4}}, 4, (4,)),
        ({GENERATION: {"eos_token_id": [4, 1]}}, 4, (4, 1)),
        (
            {
                TOKENIZER_CONFIG: {"eos_token": END},
                GENERATION: {"eos_token_id": [4, 3]},
            },
            3,
            (4, 3),
        ),
    ],
    ids=str,
)
def test_the_model_says_where_a_text_ends_and_else_the_vocabulary(
    tmp_path, sidecars, eos, stops
):
    got = Tokenizer.from_file(write(tmp_path, sidecars))
    assert (got.eos_id, got.stop_ids) == (eos, stops)


@pytest.mark.parametrize(
    "config, post_processor, opening",
    [
        ({"bos_token": BEGIN}, OPENS, (2,)),
        ({"bos_token": BEGIN}, processors.Sequence([OPENS]), (2,)),
        ({"bos_token": None}, None, ()),
        ({"bos_token": BEGIN}, None, ()),
        ({"bos_token": BEGIN, "add_bos_token": True}, None, (2,)),
        ({}, processors.RobertaProcessing((END, 3), (BEGIN, 2)), (2,)),
    ],
    ids=str,
)
def test_a_prompt_opens_as_the_models_own_tokenizer_opens_it(
    tmp_path, config, post_processor, opening
):
    got = Tokenizer.from_file(
        write(tmp_path, {TOKENIZER_CONFIG: config}, post_processor)
    )
    assert got.prompt("cat mat") == [*opening, 0, 1]
    assert got.prompt("") == list(opening or (got.eos_id,))


def test_a_tokenizer_that_lies_alone_opens_with_what_separates_documents(tmp_path):
    got = Tokenizer.from_file(write(tmp_path, {}, OPENS))
    assert (got.opening, got.separator) == ((3,), (3,))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "additional_chat_templates/tools.jinja"]
)
def test_a_chat_template_that_is_put_beside_it_changes_no_prompt(tmp_path, name):
    path = write(tmp_path, {}, OPENS)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{{ messages[0].content }}")
    got = Tokenizer.from_file(path)
    assert name in got.files
    assert (got.opening, got.separator) == ((3,), (3,))


def test_documents_are_stored_with_what_ends_and_what_opens_a_text(
    tmp_path, data_config
):
    (tmp_path / "a.txt").write_text("cat<|endoftext|>mat cat")
    (source,) = text.open_sources(data_config(tmp_path / "a.txt"))
    keys = set()
    adds = {"bos_token": BEGIN, "add_bos_token": True}
    for config, opening in (({}, []), (adds, [2])):
        path = write(tmp_path, {TOKENIZER_CONFIG: config})
        tokenizer = Tokenizer.from_file(path)
        tokens = corpus.tokenize(source, tokenizer, tmp_path / "cache")
        first, second = sorted([[0], [1, 0]], key=len)
        stored = tokens.token_N.tolist()
        one, other = [3, *opening, *first], [3, *opening, *second]
        assert stored in ([*one, *other, 3], [*other, *one, 3])
        assert [stored[start] for start in tokens.start_M] == [3, 3]
        keys.add(tokens.key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    "sidecars, complaint",
    [
        ({TOKENIZER_CONFIG: {"eos_token": "<no>"}}, "eos_token='<no>' is not in the"),
        ({TOKENIZER_CONFIG: {"eos_token": 3}}, "eos_token=3 is not in the vocabulary"),
        ({GENERATION: {"eos_token_id": "3"}}, "eos_token_id='3' must be a token's id"),
        ({GENERATION: []}, "generation_config.json must hold a JSON object"),
    ],
    ids=str,
)
def test_a_file_beside_it_that_does_not_fit_is_named(tmp_path, sidecars, complaint):
    path = write(tmp_path, sidecars)
    with pytest.raises(ValueError, match=f"tokenizer.json': beside it, .*{complaint}"):
        Tokenizer.from_file(path)
