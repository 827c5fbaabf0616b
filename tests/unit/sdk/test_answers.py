"""What a trainer says of itself and its runs, as the values users get."""

import dataclasses
from datetime import UTC, datetime
from typing import Any

import gradwire
import pytest
from gradwire._client import answers
from gradwire._client.lora_settings import tell_of_kinds_left_out
from gradwire.errors import GradwireError
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.checkpoint_pb2 import LoraLayout
from gradwire.v1.run_pb2 import RUN_STATE_LOST, Run

VALUES = {
    gradwire.ServerInfo: pb.GetServerInfoResponse,
    gradwire.ModelInfo: pb.ModelInfo,
    gradwire.Mesh: pb.Mesh,
    gradwire.LossInfo: pb.LossInfo,
    gradwire.Limits: pb.Limits,
    gradwire.ListedRun: Run,
}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)
def test_a_value_has_every_field_of_its_message(value: Any):
    # Where its client is in the order is the SDK's own business; what an adapter adapts is told of one run only.
    inner = {"next_seq_id", "lora"}
    assert {field.name for field in dataclasses.fields(value)} == {*VALUES[value].DESCRIPTOR.fields_by_name} - inner


def test_server_info_is_plain_values_all_the_way_down():
    message = pb.GetServerInfoResponse(
        software_version="0.1.0",
        min_protocol_version=1,
        max_protocol_version=2,
        models=[pb.ModelInfo(base_model="m", vocab_size=7, max_context_length=64, num_parameters=9)],
        losses=[pb.LossInfo(name="ppo", loss_fn_inputs=["advantages"], loss_fn_config_defaults={"epsilon": 0.2})],
        limits=pb.Limits(max_runs=4),
        ready=True,
    )
    info = answers.server_info(message)
    assert (info.software_version, info.min_protocol_version, info.max_protocol_version) == ("0.1.0", 1, 2)
    assert (info.ready, info.status_message, info.limits.max_runs, info.limits.max_datums) == (True, "", 4, 0)
    (model,), (loss,) = info.models, info.losses
    assert (model.base_model, model.vocab_size, model.max_context_length, model.num_parameters) == ("m", 7, 64, 9)
    assert loss == gradwire.LossInfo("ppo", ("advantages",), (), {"epsilon": 0.2}, False)
    assert model.mesh == gradwire.Mesh(world_size=1, local_world_size=1, nnodes=1, fsdp_size=1)
    assert answers.server_capabilities(info).supported_models == [gradwire.SupportedModel("m", 64)]


def test_a_listed_run_has_a_state_by_name_and_a_time():
    message = Run(run_id="r", state=RUN_STATE_LOST, step=3, user_metadata={"a": "b"}, attached=True)
    message.created_at.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
    run = answers.listed_run(message)
    assert (run.run_id, run.state, run.step, run.attached) == ("r", "lost", 3, True)
    assert (run.created_at, run.user_metadata) == (datetime(2026, 1, 2, tzinfo=UTC), {"a": "b"})
    message.created_at.seconds = 1 << 60
    with pytest.raises(GradwireError, match="created_at that is no time"):
        answers.listed_run(message)


def test_what_an_adapter_adapts_is_told_and_a_kind_asked_for_in_vain_is_logged(caplog: pytest.LogCaptureFixture):
    message = Run(run_id="r", lora_rank=4)
    assert answers.run_info(message, gradwire.ModelInfo("m", "", 7, 64, 9, "", "", "", "")).lora is None
    message.lora.MergeFrom(LoraLayout(lora_alpha=8, train_attn=True, adapted=["h.*.mixer.in_proj"], left_out=["h.*.a"]))
    found = answers.run_info(message, gradwire.ModelInfo("m", "", 7, 64, 9, "", "", "", "")).lora
    assert found == gradwire.LoraLayout(8, False, True, False, ("h.*.mixer.in_proj",), ("h.*.a",))
    tell_of_kinds_left_out({"train_mlp": None, "train_attn": None, "train_unembed": False}, message)
    assert [record.getMessage() for record in caplog.records] == [
        "train_mlp has no effect on r: its model has nothing of that kind to adapt."
    ]


def test_a_replay_that_came_out_as_it_did_has_no_difference():
    assert answers.replay_report(pb.ReplayRunResponse(compared=5)) == gradwire.ReplayReport(0, 5, 0, None)
    different = pb.ReplayRunResponse(difference=pb.ReplayDifference(seq_id=4, kind="optim_step"))
    found = answers.replay_report(different).difference
    assert found is not None
    assert (found.seq_id, found.kind, found.step) == (4, "optim_step", 0)
