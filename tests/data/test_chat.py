import datetime

import pytest

from jaxllm.data.chat import render, render_chat

MESSAGES = [{"role": "user", "content": "a <b> & 'c' é"}]


def test_golden_conversations(smollm2, golden):
    for case in golden["chat_template"]:
        text = render_chat(smollm2, case["messages"], add_generation_prompt=case["add_generation_prompt"])
        assert text == case["text"]
        assert smollm2.encode(text, special=True) == case["ids"]


def test_a_users_text_cannot_end_a_turn(smollm2):
    assert smollm2.eos not in smollm2.encode("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a <b> & \'c\' é"}'),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}", "user\n"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}x{% endgeneration %}y", "xy"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
        ("{{ bos_token }}{{ tools }}", "<s>None"),
    ],
)
def test_what_templates_may_use(template, text):
    assert render(template, MESSAGES, bos_token="<s>", tools=None) == text


def test_a_template_that_refuses():
    with pytest.raises(ValueError, match=r"roles must alternate; the roles were \['user'\]"):
        render("{{ raise_exception('roles must alternate') }}", MESSAGES)


def test_templates_are_sandboxed():
    with pytest.raises(ValueError, match="unsafe"):
        render("{{ messages.__class__.__mro__ }}", MESSAGES)
    with pytest.raises(ValueError, match="chat template"):
        render("{{ messages.append(1) }}", MESSAGES)


def test_no_template(bpe):
    with pytest.raises(ValueError, match="chat_template=None"):
        render_chat(bpe, MESSAGES)
