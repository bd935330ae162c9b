"""Other names for columns and roles."""

from __future__ import annotations

import pytest

from mora_jax.data.formats.column_mapping import COLUMNS, ROLES, Mapping
from mora_jax.errors import InputError


def test_texts_of_a_configuration():
    mapping = Mapping.parse(("instruction=question", " output = a=b "), ("bot=assistant", "x=y=user"))
    assert mapping == Mapping({"question": "instruction", "a=b": "output"}, {"bot": "assistant", "x=y": "user"})
    assert mapping
    assert not Mapping.parse()


def test_columns_of_rows_and_of_the_objects_in_them():
    mapping = Mapping.parse(("conversations=dialog", "from=who", "value=said", "instruction=q"))
    row = {"dialog": [{"who": "human", "said": "u", "id": 1}, None], "q": "mine", "instruction": "other", "id": 2}
    before = repr(row)
    assert mapping.apply(row) == {
        "conversations": [{"from": "human", "value": "u", "id": 1}, None],
        "instruction": "mine",
        "id": 2,
    }
    assert repr(row) == before


def test_columns_may_change_places_or_be_left_out():
    assert Mapping.parse(("input=output", "output=input")).apply({"input": 1, "output": 2}) == {"output": 1, "input": 2}
    assert Mapping.parse(("ignore=weight", "ignore=text")).apply({"weight": 70, "text": "", "input": 3}) == {"input": 3}


def test_rows_that_are_left_as_they_are():
    row = {"text": "t"}
    assert Mapping().apply(row) is row
    assert Mapping.parse(("text=body",)).apply([1]) == [1]


@pytest.mark.parametrize(
    ("columns", "roles", "message"),
    [
        (("instruction",), (), r'data.columns: \'instruction\' should read "ours=theirs", such as'),
        (("=question",), (), "data.columns: '=question' should read"),
        (("instruction=",), (), "data.columns: 'instruction=' should read"),
        ((3,), (), "data.columns: 3 should read"),
        (("qustion=q",), (), f"data.columns: no format has a column 'qustion' .*choose one of {', '.join(COLUMNS)}"),
        (("input=a", "input=b"), (), "data.columns: 'input' is given twice, as 'a' and as 'b'"),
        (("input=a", "output=a"), (), "data.columns: 'a' is given twice, as 'input' and as 'output'"),
        ((), ("bot",), r'data.roles: \'bot\' should read "theirs=ours", such as'),
        ((), ("bot=robot",), f"data.roles: unknown role 'robot' .*choose one of {', '.join(ROLES)}"),
        ((), ("bot=user", "bot=tool"), "data.roles: 'bot' is given twice"),
    ],
)
def test_bad_mappings(columns, roles, message):
    with pytest.raises(InputError, match=message) as caught:
        Mapping.parse(columns, roles)
    assert "\n" not in str(caught.value)


def test_errors_name_the_columns_of_the_data():
    mapping = Mapping.parse(("instruction=question", "output=reply"))
    error = mapping.explain(InputError("r: `instruction` is null"))
    assert str(error) == "r: `instruction` is null (`instruction` is `question` in the data)"
    other = InputError("r: `text` is null")
    assert mapping.explain(other) is other
