"""Names that lists of MoE models often hold, and why they have no preset."""

NOT_MOE = {
    "command-r-plus": "Command R+ is a dense model of 104B parameters (CohereForAI/c4ai-command-r-plus): it has no "
    "experts",
    "gemma-2": "Gemma 2 is dense in all its sizes (Gemma team 2024, arXiv:2408.00118): it has no experts; Gemma 4's "
    "MoE model is 'gemma-4-26b'",
    "gpt-4": "GPT-4's architecture is unpublished (OpenAI 2023, arXiv:2303.08774, section 2): no number of experts can "
    "be given",
    "qwen2.5-max": "Qwen2.5-Max is an MoE model whose sizes are unpublished",
}
