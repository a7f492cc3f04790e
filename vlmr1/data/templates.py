"""Question templates, by name (VLM-R1's own words)."""

REC_QUESTION = (
    "{question} First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. Output the final answer in JSON format."
)
TEMPLATES = {"rec": REC_QUESTION, "none": "{question}"}
