"""Samples that lack a modality: left out of what needs all modalities, with their number; masked in the attention."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture
from lightning_xattn.core.errors import DiscoveryError, SettingError, XAttnWarning
from tests.toy import quiet_trainer

WIDTH, CLASSES, SAMPLES, VISITS, PATCHES = 8, 3, 90, 4, 6


class Hospital(LightningModule):
    """Visits and an X-ray attend to each other; a learned token stands in for an X-ray that is not there."""

    def __init__(self, hides_absent=False):
        super().__init__()
        torch.manual_seed(0)
        self.hides_absent = hides_absent
        self.ehr, self.xray = nn.Linear(5, WIDTH), nn.Linear(4, WIDTH)
        self.instead = nn.Parameter(torch.randn(WIDTH))
        self.ehr_to_xray_attn, self.xray_to_ehr_attn = (
            nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(2 * WIDTH, CLASSES)
        for one in self.parameters():
            nn.init.normal_(one, std=0.7)

    def forward(self, visits, xray, has_xray):
        x, y = self.ehr(visits), torch.where(has_xray[:, None, None], self.xray(xray), self.instead)
        padding = ~has_xray[:, None].expand(y.shape[:2]) if self.hides_absent else None
        there, _ = self.ehr_to_xray_attn(x, y, y, key_padding_mask=padding)
        back, _ = self.xray_to_ehr_attn(y, x, x)
        there = torch.where(has_xray[:, None, None], there, 0)  # attention to nothing is NaN
        return self.head(torch.cat([there.mean(1), back.mean(1)], 1))

    def validation_step(self, batch, batch_idx):
        visits, xray, has_xray, target = batch
        logits = self(visits, xray, has_xray)
        self.log("val_loss", F.cross_entropy(logits, target))
        return {"logits": logits}


def make_data():
    generator = torch.Generator().manual_seed(1)
    visits = torch.randn(SAMPLES, VISITS, 5, generator=generator)
    xray = torch.randn(SAMPLES, PATCHES, 4, generator=generator)
    has_xray = torch.rand(SAMPLES, generator=generator) < 0.6
    xray[~has_xray] = 0
    target = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return TensorDataset(visits, xray, has_xray, target)


def has_xray_of(outputs, batch):
    return batch[2]


def observe(module, data, **settings):
    callback = AttentionExplainabilityCallback(**settings)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(module, DataLoader(data, batch_size=10), verbose=False)
    return callback, trainer


DATA = make_data()
COMPLETE = TensorDataset(*(one[DATA.tensors[2]] for one in DATA.tensors))


@pytest.mark.parametrize("hides_absent", [False, True])
def test_samples_without_an_xray_are_counted_and_left_out(hides_absent, caplog):
    """Either the setting says which they are, or a mask that hides all of the X-ray does."""
    lacking = int((~DATA.tensors[2]).sum())
    settings = {} if hides_absent else {"present": {"xray": has_xray_of}}
    says = pytest.warns(XAttnWarning, match="one modality is wholly masked") if hides_absent else nullcontext()
    with says, caplog.at_level("INFO"):
        callback, _ = observe(Hospital(hides_absent), DATA, **settings, contribution_samples=SAMPLES)
    assert f"{lacking} samples lack xray: they are left out of probes and contributions." in caplog.text
    alone, _ = observe(Hospital(hides_absent), COMPLETE, contribution_samples=SAMPLES)
    fusion, of_complete = callback.fusion_summaries["val"], alone.fusion_summaries["val"]
    assert fusion.missing == {"xray": lacking}
    assert (fusion.samples, fusion.nonfinite) == (SAMPLES - lacking, 0)
    assert not fusion.contribution_problem
    assert fusion.rows["hash"].numel() == of_complete.samples
    assert callback.history[-1]["missing"] == {"xray": lacking}
    layer = callback.summaries["val"]
    assert layer.wholly_masked == lacking
    curves = {name: one for name, one in callback.history[0].items() if name.startswith(("entropy/", "alignment/"))}
    expected = {name: alone.history[0][name] for name in curves}
    assert len(curves) > 10
    assert curves == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_contributions_are_those_by_exchange_among_the_samples_that_have_both():
    module = Hospital().eval()
    present = {"xray": has_xray_of}
    result = ExplainabilityCapture(
        module, present=present, contribution_samples=SAMPLES, predict=lambda model, batch: model(*batch[:3])
    ).explain_loader(DataLoader(DATA, batch_size=10), partners="all")
    fusion = result.fusion
    visits, xray, has_xray, _ = COMPLETE.tensors
    n = len(visits)
    assert fusion.samples == n
    rows, columns = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    with torch.no_grad():
        intact = module(visits, xray, has_xray).softmax(1)
        said = intact.argmax(1)
        own_visits = module(visits[rows], xray[columns], has_xray[rows]).softmax(1)
        own_xray = module(visits[columns], xray[rows], has_xray[rows]).softmax(1)

    def mean_over_partners(values):
        at_class = values.gather(1, said[rows][:, None])[:, 0]
        return at_class.double().view(n, n - 1).mean(1)

    whole = intact.gather(1, said[:, None])[:, 0].double()
    nothing = mean_over_partners(intact[columns])
    a, b = mean_over_partners(own_visits), mean_over_partners(own_xray)
    places = {int(number): i for i, number in enumerate(fusion.sample_numbers)}
    order = [places[int(i)] for i in has_xray_places()]
    torch.testing.assert_close(fusion.numbers["phi/ehr"][order], (a - nothing + whole - b) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(fusion.numbers["phi/xray"][order], (b - nothing + whole - a) / 2, atol=1e-6, rtol=0)


def has_xray_places():
    return DATA.tensors[2].nonzero()[:, 0].tolist()


def test_explained_samples_have_no_attention_to_what_they_lack():
    explainer = ExplainabilityCapture(
        Hospital(), present={"xray": has_xray_of}, predict=lambda model, batch: model(*batch[:3])
    )
    batch = DATA[:10]
    explained = explainer.explain_batch(batch)
    entropies = [[*one["head_entropies"].values()] for one in explained["per_sample_explanations"]]
    assert torch.tensor(entropies).isnan().all(1).equal(~batch[2])


class ByRow(Hospital):
    """Encodes only the X-rays that are there."""

    def forward(self, visits, xray, has_xray):
        x, y = self.ehr(visits), torch.zeros(len(visits), PATCHES, WIDTH)
        y[has_xray] = self.xray(xray[has_xray])
        there, _ = self.ehr_to_xray_attn(x, y, y)
        back, _ = self.xray_to_ehr_attn(y, x, x)
        return self.head(torch.cat([there.mean(1), back.mean(1)], 1))


@pytest.mark.parametrize("first", ["mixed", "complete", "lacking"])
def test_an_encoder_that_runs_on_the_samples_that_have_an_xray(first):
    """Whatever the first batch has, all samples that have an X-ray are in the numbers."""
    has_xray = DATA.tensors[2]
    order = {"mixed": torch.arange(SAMPLES), "complete": (~has_xray).long().argsort(stable=True)}
    order["lacking"] = order["complete"].flip(0)
    data = TensorDataset(*(one[order[first]] for one in DATA.tensors))
    lacking = int((~has_xray).sum())
    assert has_xray[order[first]][:10].sum().item() in {"complete": {10}, "lacking": {0}}.get(first, range(1, 10))
    callback, _ = observe(ByRow(), data, present={"xray": has_xray_of}, contribution_samples=SAMPLES)
    fusion = callback.fusion_summaries["val"]
    assert not fusion.contribution_problem
    # A first step in which nobody has an X-ray shows no modalities: its samples are counted.
    unrecorded = 10 if first == "lacking" else 0
    while first == "lacking" and not bool(data.tensors[2][unrecorded : unrecorded + 10].any()):
        unrecorded += 10
    assert (fusion.missing["xray"], fusion.unrecorded) == (lacking - unrecorded, unrecorded)
    assert fusion.samples == SAMPLES - lacking


def test_without_the_setting_steps_of_such_an_encoder_are_left_out_and_counted(infos):
    order = (~DATA.tensors[2]).long().argsort(stable=True)
    data = TensorDataset(*(one[order] for one in DATA.tensors))
    callback, _ = observe(ByRow(), data)
    fusion = callback.fusion_summaries["val"]
    assert fusion.samples + fusion.unrecorded == SAMPLES
    assert fusion.unrecorded == callback.history[-1]["unrecorded"] > 0
    assert f"{fusion.unrecorded} samples are left out of probes and contributions" in infos.text
    assert "say which have it: present={'xray': ...}" in infos.text


def test_no_sample_has_an_xray():
    data = TensorDataset(*DATA.tensors[:2], torch.zeros(SAMPLES, dtype=torch.bool), DATA.tensors[3])
    callback, _ = observe(
        Hospital(hides_absent=False),
        data,
        present={"ehr": lambda _, batch: batch[3] >= 0, "xray": lambda _, batch: torch.arange(len(batch[2])) < 0},
    )
    assert not callback.fusion_summaries


@pytest.mark.parametrize("setting", ["has_xray", {"xray": None}, {"xray": 3}])
def test_a_wrong_setting_fails_at_once(setting):
    with pytest.raises(SettingError, match="present"):
        AttentionExplainabilityCallback(present=setting)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({"scan": has_xray_of}, r"present names 'scan', but the modalities are 'ehr', 'xray'"),
        ({"xray": "has_scan"}, r"Expected present\['xray'\] \(batch,\) \(10,\), True or 1"),
        ({"xray": lambda outputs, batch: batch[2] * torch.nan}, r"False or 0 for one that lacks it.* with nan"),
        ({"xray": lambda outputs, batch: batch[2] * 0.2}, r"with 0.2"),
        ({"xray": lambda outputs, batch: batch[1]}, r"Expected present\['xray'\].*gave .*\(10, 6, 4\)"),
    ],
)
def test_what_does_not_fit_the_batch_is_an_error(present, message):
    with pytest.raises(Exception, match=message):
        observe(Hospital(), DATA, present=present)


def test_a_modality_that_the_attention_calls_otherwise_is_refused():
    names = {"attention": {"visit_to_img": "ehr_to_xray_attn", "img_to_visit": "xray_to_ehr_attn"}}
    with pytest.raises(DiscoveryError, match=r"The attention calls some of them 'visit', 'img'. Give each one name"):
        observe(Hospital(), DATA, present={"X": has_xray_of}, modalities={"E": "ehr", "X": "xray"}, **names)


def test_a_batch_is_explained_though_no_attention_has_the_modality_that_is_missing():
    notes = {"notes": lambda _, batch: batch[2]}
    named = {"modalities": {"ehr": "ehr", "xray": "xray", "notes": "head"}}
    explainer = ExplainabilityCapture(
        Hospital(), present=notes, predict=lambda model, batch: model(*batch[:3]), **named
    )
    assert len(explainer.explain_batch(DATA[:10])["per_sample_explanations"]) == 10
