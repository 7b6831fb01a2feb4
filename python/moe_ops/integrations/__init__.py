"""moe_ops inside other libraries; each module here needs the library it is named after, and says so where it is missing."""
