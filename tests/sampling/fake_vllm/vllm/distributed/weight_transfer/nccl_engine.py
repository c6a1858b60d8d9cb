"""The trainer's side of the weight transfer: what is sent waits in `sent` for the fake server."""

import types

sent = []
endpoint = types.SimpleNamespace(group=types.SimpleNamespace(store=None, socket=None))


class NCCLTrainerSendWeightsArgs:
    def __init__(self, group, packed):
        assert group is endpoint and packed


class NCCLWeightTransferEngine:
    @staticmethod
    def trainer_init(init_info):
        assert init_info["world_size"] == 2
        return endpoint

    @staticmethod
    def trainer_send_weights(iterator, trainer_args):
        sent.extend((name, weight.clone()) for name, weight in iterator)
