from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from pyaccel.data import Augment, Batch, Batches, ImageSet, epoch_order
from pyaccel.data.batches import PREFETCH


def joined(batches):
    """The batches of an iterator as one."""
    return Batch(*(torch.cat(part) for part in zip(*batches)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pyaccel-batches")]


class Watched(Dataset):
    """Counts the batches asked for, remembers the thread, fails at a given sample."""

    def __init__(self, inner, bad=None):
        self.inner, self.bad, self.calls, self.threads, self.second = inner, bad, 0, set(), threading.Event()

    def __len__(self):
        return len(self.inner)

    def batch(self, ids):
        self.calls += 1
        self.threads.add(threading.current_thread())
        if self.calls == 2:
            self.second.set()
        if self.bad in ids.tolist():
            raise ValueError(f"sample {self.bad} is broken")
        return self.inner.batch(ids)


def test_batches_hold_what_the_order_says(image_set):
    data, augment = image_set(23), Augment(2, True)
    batches = Batches(data, 5, seed=3, shuffle=True, drop_last=False, augment=augment)
    got, order = list(batches.epoch(4)), epoch_order(23, 3, 4)
    assert len(batches) == len(got) == 5 and [len(batch.labels) for batch in got] == [5, 5, 5, 5, 3]
    for batch, ids in zip(got, order.split(5), strict=True):
        assert batch.sample_ids.dtype == batch.labels.dtype == torch.int64
        assert torch.equal(batch.sample_ids, ids) and torch.equal(batch.labels, data.labels[ids])
        assert torch.equal(batch.images, augment(data.images[ids], ids, 3, 4, 23))
    assert not torch.equal(joined(batches.epoch(5)).sample_ids, order)


def test_without_shuffle_the_order_is_as_stored(image_set):
    batch = joined(Batches(image_set(7), 3, shuffle=False, drop_last=False).epoch(9))
    assert batch.sample_ids.tolist() == list(range(7))
    assert torch.equal(batch.images, image_set(7).images.float() / 255)


@pytest.mark.parametrize(("n", "size", "drop_last", "lengths"), [
    (10, 5, False, [5, 5]), (10, 5, True, [5, 5]), (11, 5, True, [5, 5]), (11, 5, False, [5, 5, 1]),
    (3, 5, False, [3]), (0, 5, False, []), (0, 5, True, []), (5, 5, True, [5]), (1, 1, True, [1])])
def test_lengths(image_set, n, size, drop_last, lengths):
    batches = Batches(image_set(n), size, shuffle=True, drop_last=drop_last)
    assert [len(batch.labels) for batch in batches.epoch(0)] == lengths and len(batches) == len(lengths)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 40), part=st.integers(1, 4), world=st.integers(1, 4), seed=st.integers(0, 5),
       epoch=st.integers(0, 5))
def test_ranks_together_see_the_global_batches(n, part, world, seed, epoch):
    images = torch.arange(n * 16).remainder(251).to(torch.uint8).view(n, 1, 4, 4)
    data = ImageSet(images, torch.arange(n) % 3, "abc", "x")
    arguments = dict(seed=seed, shuffle=True, drop_last=False, augment=Augment(1, True))
    alone = Batches(data, part * world, **arguments)
    ranks = [Batches(data, part * world, **arguments, rank=rank, world=world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for whole, *slices in zip(alone.epoch(epoch), *(rank.epoch(epoch) for rank in ranks), strict=True):
        assert same(joined(slices), whole)
        sizes = [len(piece.labels) for piece in slices]
        assert max(sizes) - min(sizes) <= 1
        if len(whole.labels) == part * world:
            assert set(sizes) == {part}


@pytest.mark.parametrize("first", range(6))
def test_a_resumed_epoch_is_the_tail_of_the_whole(image_set, first):
    batches = Batches(image_set(23), 5, seed=1, shuffle=True, drop_last=False, augment=Augment(2, True), world=5)
    tail = list(batches.epoch(2))[first:]
    resumed = list(batches.epoch(2, first_batch=first))
    assert len(tail) == len(resumed) == 5 - first
    assert all(same(a, b) for a, b in zip(tail, resumed, strict=True))


class Items(Dataset):
    """A data set of items alone, as any user writes one."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


@pytest.mark.parametrize("labels", [list, torch.tensor], ids=["int", "tensor"])
def test_any_dataset_is_accepted(image_set, labels):
    data = image_set(11)
    items = Items(data.images, labels(data.labels.tolist()))
    arguments = dict(shuffle=True, drop_last=False, augment=Augment(2, True), rank=2, world=4)
    got, expected = list(Batches(items, 8, **arguments).epoch(0)), list(Batches(data, 8, **arguments).epoch(0))
    assert len(got) == 2 and all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_an_empty_slice_has_the_shape_of_images(image_set):
    data = image_set(9)
    for dataset in (data, Items(data.images, data.labels)):
        last = list(Batches(dataset, 8, shuffle=False, drop_last=False, rank=0, world=8).epoch(0))[-1]
        assert last.images.shape == (0, 3, 8, 8) and last.labels.shape == last.sample_ids.shape == (0,)
        assert last.images.dtype == torch.float32 and last.labels.dtype == torch.int64


def test_float_images_pass_unchanged_and_allow_no_augment():
    images = torch.linspace(-3, 3, 2 * 12, dtype=torch.float64).view(2, 3, 2, 2)
    batch, = Batches(Items(images, [0, 1]), 2, shuffle=False, drop_last=False).epoch(0)
    assert torch.equal(batch.images, images.float())
    with pytest.raises(TypeError, match="Augment: images must be uint8, got torch.float64"):
        list(Batches(Items(images, [0, 1]), 2, shuffle=False, drop_last=False, augment=Augment()).epoch(0))


def test_one_other_thread_works_at_most_two_batches_ahead(image_set):
    data = Watched(image_set(20))
    iterator = Batches(data, 2, shuffle=True, drop_last=True).epoch(0)
    assert data.calls == 0 and not threads()
    for consumed, _ in enumerate(iterator, 1):
        if consumed == 1:
            assert data.second.wait(30)  # The next batch is made while this one is held.
        assert data.calls <= consumed + PREFETCH
    assert data.calls == 10
    assert len(data.threads) == 1 and threading.main_thread() not in data.threads


def test_an_error_arrives_at_its_batch(image_set):
    data = Watched(image_set(20), bad=7)
    iterator = Batches(data, 2, shuffle=False, drop_last=True).epoch(0)
    assert [next(iterator).sample_ids.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="sample 7 is broken"):
        next(iterator)
    assert not threads()
    assert list(iterator) == []


@pytest.mark.parametrize("leave", ["end", "close", "drop", "break"])
def test_no_thread_outlives_its_iterator(image_set, leave):
    data = Watched(image_set(20))
    iterator = Batches(data, 2, shuffle=True, drop_last=True).epoch(0)
    next(iterator)
    assert len(threads()) == 1
    if leave == "end":
        assert len(list(iterator)) == 9
    elif leave == "close":
        iterator.close()
    elif leave == "break":
        for _ in iterator:
            break
        del iterator
    else:
        del iterator
    gc.collect()
    assert not threads()
    assert leave == "end" or data.calls <= 2 + PREFETCH


def test_two_epochs_at_once(image_set):
    batches = Batches(image_set(12), 3, shuffle=True, drop_last=True, augment=Augment(2, True))
    expected = [list(batches.epoch(e)) for e in (0, 1, 2)]
    mixed = list(zip(*(batches.epoch(e) for e in (0, 1, 2)), strict=True))
    assert all(same(mixed[k][e], expected[e][k]) for e in range(3) for k in range(4))


@pytest.mark.parametrize(("arguments", "text"), [
    (dict(batch_size=6, rank=2, world=2), r"rank must be in 0\.\.world-1, got rank 2, world 2"),
    (dict(batch_size=6, rank=-1, world=2), r"rank must be in 0\.\.world-1, got rank -1, world 2"),
    (dict(batch_size=6, world=0), r"rank must be in 0\.\.world-1, got rank 0, world 0"),
    (dict(batch_size=6, world=4), r"batch_size counts all ranks and must be a positive multiple of world \(4\), got 6"),
    (dict(batch_size=0), r"batch_size counts all ranks and must be a positive multiple of world \(1\), got 0"),
    (dict(batch_size=32), "20 images make no full batch of 32 and drop_last is set; choose a smaller batch_size"),
])
def test_refuses(image_set, arguments, text):
    with pytest.raises(ValueError, match=f"Batches: {text}"):
        Batches(image_set(20), shuffle=True, drop_last=True, **arguments)


@pytest.mark.parametrize("first", [-1, 5])
def test_first_batch_out_of_range_is_refused_at_once(image_set, first):
    with pytest.raises(ValueError, match=rf"Batches: first_batch must be in 0\.\.4, got {first}"):
        Batches(image_set(20), 5, shuffle=True, drop_last=True).epoch(0, first)
