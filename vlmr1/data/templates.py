"""Question templates by name: VLM-R1's wording of its tasks, which differs for some model families."""

from __future__ import annotations

from vlmr1.data.messages import check_template

DEFAULT = (
    "{question} First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags."
)
TAGS = (
    "First thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think>"
)
REC_QUESTION = f"{DEFAULT} Output the final answer in JSON format."
TEMPLATES = {
    "default": DEFAULT,
    "rec": REC_QUESTION,  # a referring expression -> a box
    "ic": f"{{question}} {TAGS}<answer> json format answer here </answer>",  # image captions
    "odLength": f"{TAGS}<answer> answer here </answer>\n{{question}}",  # object detection with the length reward
    "gui": DEFAULT,  # defects in screenshots, several images
    "no-think": "{question} Output the final answer in <answer> </answer> tags.",
    "none": "{question}",
}
AUTO = "auto"  # one of them for each row, by what the rewards read
ONE_WORDING = {name: DEFAULT for name in ("rec", "ic", "odLength", "gui")}
OF_FAMILY = {"internvl": ONE_WORDING, "glm4v": ONE_WORDING}  # by model type, where it differs from TEMPLATES


def question_text(template: str, model_type: str | None = None) -> str:
    """Return a template by its name, in the wording for a model type, or the text itself.

    SettingError for an unknown name, or a text without exactly one `{question}`."""
    text = OF_FAMILY.get(model_type or "", {}).get(template) or TEMPLATES.get(template, template)
    check_template(text, (AUTO, *TEMPLATES))
    return text
