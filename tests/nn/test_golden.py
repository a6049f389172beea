"""The network computes what the reference vectors say."""

import torch
import torch.nn.functional as F


def test_encode_gives_the_reference_ids(golden):
    s1, s2 = golden.tokenizer.encode(golden.tensor("x"), half=True)
    assert torch.equal(s1, golden.tensor("s1"))
    assert torch.equal(s2, golden.tensor("s2"))
    assert torch.equal(golden.tokenizer.encode(golden.tensor("x")), golden.tensor("full_ids"))


def test_decode_gives_the_reference_bars_from_either_form_of_ids(golden):
    halves = golden.tokenizer.decode([golden.tensor("s1"), golden.tensor("s2")], half=True)
    golden.close(halves, "decoded")
    golden.close(golden.tokenizer.decode(golden.tensor("full_ids")), "decoded")


def test_tokenizer_forward(golden):
    (recon_s1, recon), bsq_loss, quantized, ids = golden.tokenizer(golden.tensor("x"))
    golden.close(recon_s1, "recon_s1")
    golden.close(recon, "recon")
    golden.close(quantized, "quantized")
    golden.close(bsq_loss, "bsq_loss")
    assert torch.equal(ids, golden.tensor("full_ids"))


def test_model_logits_of_s1_and_of_s2_in_the_published_rotation(golden):
    length = golden.vectors["s1"].shape[1]
    logits, context = golden.model.decode_s1(
        golden.tensor("s1"), golden.tensor("s2"), golden.tensor("stamp")[:, :length]
    )
    golden.close(logits, "decode_s1_logits")
    golden.close(context, "context")
    next_s1 = logits[:, -1].argmax(-1, keepdim=True)
    assert torch.equal(next_s1, golden.tensor("next_s1"))
    golden.close(golden.model.decode_s2(context, next_s1)[:, -1], "decode_s2_last_logits")


def test_tokenizer_loss_and_gradient(golden):
    x, tokenizer = golden.tensor("x"), golden.tokenizer.train()
    (recon_s1, recon), bsq_loss, _, _ = tokenizer(x)
    loss = (F.mse_loss(recon_s1, x) + F.mse_loss(recon, x) + bsq_loss) / 2
    loss.backward()
    golden.close(loss, "tokenizer_loss")
    golden.close(torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1e9), "tokenizer_grad_norm")


def test_model_loss_and_gradient_with_teacher_forcing(golden):
    s1, s2, model = golden.tensor("s1"), golden.tensor("s2"), golden.model.train()
    stamp = golden.tensor("stamp")[:, : s1.shape[1] - 1]
    logits = model(s1[:, :-1], s2[:, :-1], stamp, use_teacher_forcing=True, s1_targets=s1[:, 1:])
    loss, ce_s1, ce_s2 = model.head.compute_loss(*logits, s1[:, 1:], s2[:, 1:])
    loss.backward()
    golden.close(loss, "model_loss")
    golden.close(ce_s1, "ce_s1")
    golden.close(ce_s2, "ce_s2")
    golden.close(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9), "model_grad_norm")
