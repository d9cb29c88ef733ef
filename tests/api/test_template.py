"""Chat templates run in a sandbox."""

from pathlib import Path

import pytest

from tolserve.api.template import ChatTemplate, TemplateError

HELLO = [{"role": "user", "content": "Hello"}]


def test_the_names_that_templates_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "<{{ m['role'] }}>{{ m.content | trim | tojson }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = ChatTemplate(source, {"bos_token": "[B]", "eos_token": "[E]"})
    assert template.render([*HELLO, {"role": "skip", "content": ""}]) == '[B]<user>"Hello"[E]<assistant>'
    assert template.render(HELLO, add_generation_prompt=False) == '[B]<user>"Hello"[E]'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
        "{% include 'secret' %}",
        "{{ messages[5].content }}",
        "{{ 1 // 0 }}",
        "{{ 1 + 'a' }}",
        "{{ raise_exception('no system role here') }}",
    ],
)
def test_what_breaks_or_escapes_is_an_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(HELLO)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}) is None
    named = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d{{ bos_token }}"}]}
    found = ChatTemplate.load(tmp_path, named | {"bos_token": {"content": "[B]"}})
    assert found is not None
    assert found.render(HELLO) == "d[B]"
    (tmp_path / "chat_template.jinja").write_text("file")
    found = ChatTemplate.load(tmp_path, named)
    assert found is not None
    assert found.render(HELLO) == "file"
