import types

current_platform = types.SimpleNamespace(is_cpu=lambda: True)
