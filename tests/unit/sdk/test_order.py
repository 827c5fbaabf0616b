"""The order in which a run's operations go out."""

from collections import deque

from gradwire._client.order import Call, CallOrder, OutgoingOperation
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest


def operation(name: str) -> OutgoingOperation:
    """An operation told apart by its kind and run_id."""
    request = TrainRequest()
    request.zero_grad.run_id = name
    return OutgoingOperation(request, answered=lambda _: None, failed=lambda _: None)


def call(*names: str, barrier: bool = False, custom: bool = False) -> Call:
    return Call(deque(operation(name) for name in names), barrier=barrier, custom=custom)


def sent(order: CallOrder) -> list[str]:
    """Everything that may go out now."""
    names: list[str] = []
    while (next_operation := order.next()) is not None:
        names.append(next_operation.request.zero_grad.run_id)
    return names


def test_calls_go_out_in_the_order_made():
    order = CallOrder()
    for each in (call("fb1a", "fb1b"), call("step1", barrier=True), call("fb2")):
        order.add(each)
    assert sent(order) == ["fb1a", "fb1b", "step1", "fb2"]


def test_optim_step_waits_for_the_backward_of_a_custom_loss_and_what_follows_waits_with_it():
    order = CallOrder()
    custom = call("forward1", custom=True)
    order.add(custom)
    order.add(call("step", barrier=True))
    order.add(call("fb2"))
    assert sent(order) == ["forward1"]
    assert order.barrier_waits()
    order.overtake([operation("backward1")])
    order.close(custom)
    assert sent(order) == ["backward1", "step", "fb2"]


def test_forwards_of_further_custom_losses_need_not_wait():
    order = CallOrder()
    first, second = call("forward1", custom=True), call("forward2", custom=True)
    for each in (first, call("fb"), second):
        order.add(each)
    assert sent(order) == ["forward1", "fb", "forward2"]


def test_a_barrier_waits_for_every_custom_loss_before_it_and_none_after_it():
    order = CallOrder()
    first, second, later = (call(f"forward{i}", custom=True) for i in (1, 2, 3))
    for each in (first, second, call("step", barrier=True), later):
        order.add(each)
    assert sent(order) == ["forward1", "forward2"]
    order.close(second)
    assert sent(order) == []
    order.close(first)
    assert sent(order) == ["step", "forward3"]


def test_a_forward_inside_a_loss_overtakes_the_step_that_waits_for_that_loss():
    order = CallOrder()
    order.add(call("forward1", custom=True))
    order.add(call("step", barrier=True))
    assert sent(order) == ["forward1"]
    order.overtake([operation("inner")])
    assert sent(order) == ["inner"]


def test_a_custom_loss_given_up_halfway_sends_no_more_of_its_forwards():
    order = CallOrder()
    custom = call("forward1a", "forward1b", custom=True)
    order.add(custom)
    assert order.next() is not None
    order.close(custom)
    order.add(call("step", barrier=True))
    assert sent(order) == ["step"]


def test_drain_takes_out_everything():
    order = CallOrder()
    order.add(call("a", "b"))
    order.overtake([operation("urgent")])
    assert len(order.drain()) == 3
    assert order.next() is None


def test_size_counts_the_message():
    request = TrainRequest(backward=ops.BackwardRequest(forward_seq_id=1))
    request.backward.gradients.data = bytes(1000)
    assert OutgoingOperation(request, answered=lambda _: None, failed=lambda _: None).size_bytes > 1000


def test_an_open_custom_loss_is_not_idle():
    order = CallOrder()
    assert order.idle()
    custom = call("forward1", custom=True)
    order.add(custom)
    assert sent(order) == ["forward1"]
    assert not order.idle()
    order.close(custom)
    assert order.idle()


def test_a_call_with_more_to_come_holds_up_what_is_behind_it():
    order = CallOrder()
    made = call("fb1a")
    made.more = True
    order.add(made)
    order.add(call("step", barrier=True))
    assert sent(order) == ["fb1a"]
    assert not order.idle()
    order.extend(made, operation("fb1b"), more=True)
    assert sent(order) == ["fb1b"]
    order.extend(made, operation("fb1c"), more=False)
    assert sent(order) == ["fb1c", "step"]


def test_a_call_that_breaks_off_sends_no_more():
    order = CallOrder()
    made = call("fb1a", "fb1b")
    made.more = True
    order.add(made)
    order.add(call("fb2"))
    assert order.next() is not None
    order.break_off(made)
    assert sent(order) == ["fb2"]
