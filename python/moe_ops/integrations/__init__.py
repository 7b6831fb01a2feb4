"""moe_ops inside other libraries; each module needs the one it is named after."""
