class Retry:
    def __init__(self, **given):
        pass
