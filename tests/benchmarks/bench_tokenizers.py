"""Compare mechanisms of visual tokenizers, each on against off at equal parameters: docs/foresight.md has the results.

    record_demonstrations suite=tabletop_object output=DEMONSTRATIONS
    python tests/benchmarks/bench_tokenizers.py DEMONSTRATIONS base align frozen codes levels
    python tests/benchmarks/bench_tokenizers.py DEMONSTRATIONS noise+ --seed 1        # + also fits a predictor

600 steps of 64 pictures; two blocks of width 64, latents of 32 numbers for each patch of 16 x 16.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.foresight.patch_pca import PatchPCA
from cogvla.policy.interface import Embodiment

torch.set_num_threads(1)
STEPS, BATCH, PSTEPS = 600, 64, 500
N, D, H = 64, 32, 64


def prepare(root):
    """Six windows of each episode: pictures before, after one and after two chunks, and what belongs to them."""
    robot = build(Embodiment, load("embodiment", "tabletop"), "embodiment")
    config = replace(
        build(DataConfig, {**load("data", "tabletop"), "root": root}, "data"), labels={}, intervention=None
    )
    data = open_data(config, robot)
    columns = ["episode_index", "label.alternatives", "label.possible"]
    table = pq.read_table(Path(root) / "data", columns=columns)
    many = table.num_rows
    alt = np.stack(table["label.alternatives"].to_pylist()).astype(np.float32).reshape(many, 10, 6)[:, :, :3]
    possible, E, K = np.stack(table["label.possible"].to_pylist()), data.episode_N.numpy(), data.chunk
    rng, rows = np.random.default_rng(0), []
    starts = np.flatnonzero(np.r_[True, np.diff(E) != 0])
    for s, e in zip(starts, np.r_[starts[1:], len(E)]):
        if e - s - K > 0:
            rows.append(s + np.sort(rng.choice(e - s - K, min(6, e - s - K), replace=False)))
    rows = np.concatenate(rows)
    actions = data.executed_NA if data.executed_NA is not None else data.action_NA
    take = lambda at: np.concatenate([data.frames.take(at[i : i + 256]) for i in range(0, len(at), 256)])
    r, last = torch.from_numpy(rows), len(E) - 1
    has2 = (rows + 2 * K < len(E)) & (E[np.minimum(rows + 2 * K, last)] == E[rows])
    rest = dict(
        episode=data.episode_N[r],
        state=data.state_NS[r],
        state2=data.state_NS[r + K],
        chunk=actions[r[:, None] + torch.arange(K)],
        chunk2=actions[(r[:, None] + K + torch.arange(K)).clamp(max=last)],
        alt=torch.from_numpy(alt[rows]),
        possible=torch.from_numpy(possible[rows]),
        has2=torch.from_numpy(has2),
    )
    return take(rows), take(rows + K), take(np.minimum(rows + 2 * K, last)), rest


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        policy = load_policy("checkpoints/tabletop_40", "cpu")
        self.model = policy.model
        self.model.eval().requires_grad_(False)
        width = self.model.width
        self.condition = self.model.vision.condition(torch.zeros(1, width))

    @torch.no_grad()
    def forward(self, x):  # uint8 X3HW -> shallow, deep [X,64,F]
        got = {}

        def observer(tower, index, h):
            if tower is self.model.vision._towers()[0]:
                got[index] = h[:, tower.prefix : tower.prefix + N]

        self.model.vision.streams(x[:, None], self.condition, observer=observer)
        last = max(got)
        return torch.cat([got[1], got[last]], -1)


def block():
    return nn.TransformerEncoderLayer(H, 4, 4 * H, 0.0, "gelu", batch_first=True, norm_first=True)


def patches(x):
    return rearrange(x.float() / 255, "x c (h p) (w q) -> x (h w) (c p q)", p=16, q=16)


def unpatch(y):
    return rearrange(y, "x (h w) (c p q) -> x c (h p) (w q)", h=8, p=16, q=16, c=3)


class Book(nn.Module):
    """Nearest code of a unit sphere; widths w, straight through."""

    def __init__(self, width, codes=256, narrow=8, levels=1):
        super().__init__()
        self.down, self.up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        self.codes = nn.Parameter(F.normalize(torch.randn(codes, narrow), dim=-1))
        self.levels = levels
        self.begin = 1

    @torch.no_grad()
    def start(self, x):
        """Draw the codes from latents; for levels, a quarter from what each level leaves."""
        h = F.normalize(self.down(x), dim=-1) if self.levels == 1 else self.down(x)
        h = h.flatten(0, -2)[torch.randperm(len(x) * x.shape[1])]
        if self.levels == 1:
            self.codes.copy_(h[: len(self.codes)])
        else:
            n, left = len(self.codes) // self.levels, h
            for l in range(self.levels):
                self.codes[l * n : (l + 1) * n] = left[:n] if l == 0 else left[n * l : n * l + n]
                left = left - self.codes[: (l + 1) * n][self.near(left, self.codes[: (l + 1) * n])]
        self.begin = 1

    def near(self, x, c):
        return (x.square().sum(-1, keepdim=True) - 2 * x @ c.T + c.square().sum(-1)).argmin(-1)

    def forward(self, x):
        h = F.normalize(self.down(x), dim=-1) if self.levels == 1 else self.down(x)
        if self.begin == 0:
            return self.up(h), x.new_zeros(()), None  # continuous until its codes are drawn from the data
        c = F.normalize(self.codes, dim=-1) if self.levels == 1 else self.codes
        total, left, loss, index = 0, h, 0, []
        for _ in range(self.levels):
            i = self.near(left.detach(), c.detach())
            q = c[i]
            total = total + q
            index.append(i)
            left = left - q.detach()
            loss = loss + (h.detach() - total).square().mean() + 0.25 * (h - total.detach()).square().mean()
        out = h + (total - h).detach()
        return self.up(out), loss / self.levels, torch.stack(index, -1)


class Tokenizer(nn.Module):
    def __init__(self, o, fw):
        super().__init__()
        self.o = o
        inputs = fw if o.get("frozen") else 768
        self.enter = nn.Linear(inputs, H)
        self.pos = nn.Parameter(torch.randn(N, H) * 0.02)
        self.enc = nn.ModuleList() if o.get("frozen") else nn.ModuleList(block() for _ in range(2))
        self.out = nn.Linear(H, D)
        self.inn = nn.Linear(D, H)
        self.dpos = nn.Parameter(torch.randn(N, H) * 0.02)
        self.sem = nn.ModuleList(block() for _ in range(2)) if o.get("three") else nn.ModuleList()
        self.dec = nn.ModuleList(block() for _ in range(2))
        self.draw = nn.Linear(H, 768)
        if o.get("three"):
            self.semhead = nn.Linear(H, fw)
        if "align" in o:
            self.P = nn.Linear(D, fw)
        self.M = o.get("M", N)
        if "queries" in o or "slots" in o:
            self.q = nn.Parameter(torch.randn(self.M, H) * 0.5)
            self.cross = nn.ModuleList(nn.MultiheadAttention(H, 4, batch_first=True) for _ in range(2))
            self.qb = nn.ModuleList(block() for _ in range(2))
            self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(4))
            self.dcross = nn.MultiheadAttention(H, 4, batch_first=True)
        if o.get("codes"):
            self.book = Book(D, 256, o.get("narrow", 8), o.get("levels", 1))
        if o.get("dual"):
            self.toS, self.toP = nn.Linear(D, 16), nn.Linear(D, 8)
        if o.get("dual"):
            self.cS, self.cP = (nn.Parameter(F.normalize(torch.randn(256, w), dim=-1)) for w in (16, 8))
            self.merge = nn.Linear(24, D)
            self.semhead = nn.Linear(16, fw)
        if "keep" in o:
            self.score = nn.Linear(H, 1)
            self.hole = nn.Parameter(torch.zeros(D))

    def encode(self, x, f):
        h = self.enter(f if self.o.get("frozen") else patches(x) - 0.5) + self.pos
        for b in self.enc:
            h = b(h)
        if "queries" in self.o:
            q = self.q.expand(len(h), -1, -1)
            mask = torch.triu(torch.full((self.M, self.M), -math.inf), 1) if self.o["queries"] == "causal" else None
            for k in range(2):
                q = q + self.cross[k](self.norms[k](q), h, h, need_weights=False)[0]
                q = self.qb[k](q, src_mask=mask)
            h = q
        if "slots" in self.o:
            q = self.q.expand(len(h), -1, -1)
            for k in range(3):
                l = self.norms[0](q) @ self.norms[1](h).mT * H**-0.5
                a = (l.softmax(1) if self.o["slots"] == "compete" else l.softmax(2)) + 1e-6
                q = q + self.qb[0]((a / a.sum(-1, keepdim=True)) @ h)
            h = q
        z = self.out(h)
        self.kept = None
        if "keep" in self.o:
            s = self.score(h)[..., 0]
            if self.o["keep"] == "random":
                s = torch.rand(s.shape)
            top = s.topk(32, -1).indices
            m = torch.zeros_like(s).scatter(1, top, 1.0)
            gate = m if self.o["keep"] == "random" else m + s.sigmoid() - s.sigmoid().detach()
            z = z * gate[..., None] + self.hole * (1 - gate[..., None])
        return z

    def quantise(self, z):
        if self.o.get("codes"):
            return self.book(z)
        if self.o.get("dual") and self.begin == 0:
            s, p = F.normalize(self.toS(z), dim=-1), F.normalize(self.toP(z), dim=-1)
            self.qs = s
            return self.merge(torch.cat([s, p], -1)), z.new_zeros(()), None
        if self.o.get("dual"):
            s, p = F.normalize(self.toS(z), dim=-1), F.normalize(self.toP(z), dim=-1)
            cS, cP = F.normalize(self.cS, dim=-1), F.normalize(self.cP, dim=-1)
            dS, dP = -2 * s @ cS.T, -2 * p @ cP.T
            if self.o["dual"] == "one":
                i = j = (dS + dP).detach().argmin(-1)
            else:
                i, j = dS.detach().argmin(-1), dP.detach().argmin(-1)
            loss = sum(
                (a.detach() - c[k]).square().mean() + 0.25 * (a - c[k].detach()).square().mean()
                for a, c, k in ((s, cS, i), (p, cP, j))
            )
            qs, qp = s + (cS[i] - s).detach(), p + (cP[j] - p).detach()
            self.qs = qs
            return self.merge(torch.cat([qs, qp], -1)), loss, torch.stack([i, j], -1)
        return z, z.new_zeros(()), None

    @torch.no_grad()
    def start(self, x, f):
        z = self.encode(x, f)
        if self.o.get("codes"):
            self.book.start(z)
        if self.o.get("dual"):
            i = torch.randperm(len(z) * N)[:256]
            self.cS.copy_(F.normalize(self.toS(z), dim=-1).flatten(0, 1)[i])
            self.cP.copy_(F.normalize(self.toP(z), dim=-1).flatten(0, 1)[i])
            self.begin = 1

    def decode(self, z):
        h = self.inn(z)
        if self.M != N:
            g = self.dpos.expand(len(z), -1, -1)
            h = g + self.dcross(self.norms[3](g), h, h, need_weights=False)[0]
        else:
            h = h + self.dpos
        for b in self.sem:
            h = b(h)
        self.semantic = h
        for b in self.dec:
            h = b(h)
        return self.draw(h) + 0.5

    def loss(self, x, f, g):
        z = self.encode(x, f)
        if self.o.get("prefix"):
            m = torch.randint(1, self.M + 1, (len(z), 1), generator=g)
            z = z * (torch.arange(self.M) < m)[..., None]
        q, loss, index = self.quantise(z)
        if self.o.get("noise"):
            t = torch.rand(len(q), 1, 1, generator=g)
            s = math.sqrt(N * D / 4096)
            t = s * t / (1 + (s - 1) * t)
            q = (1 - t) * q + t * torch.randn(q.shape, generator=g)
        y = self.decode(q)
        loss = loss + (y - patches(x)).abs().mean() + 1e-3 * z.square().mean() * ("noise" in self.o)
        fn = f
        if self.o.get("align"):
            p = self.P(z)
            c = F.relu(1 - 0.5 - F.cosine_similarity(p, fn, dim=-1)).mean()
            a, b = F.normalize(p, dim=-1), F.normalize(fn, dim=-1)
            d = F.relu(((a @ a.mT) - (b @ b.mT)).abs() - 0.25).mean()
            loss = loss + self.o["align"] * (c + d)
        if self.o.get("three") == "semantic":
            loss = loss + 0.1 * (1 - F.cosine_similarity(self.semhead(self.semantic), fn, dim=-1)).mean()
        if self.o.get("dual"):
            loss = loss + 0.1 * (1 - F.cosine_similarity(self.semhead(self.qs), fn, dim=-1)).mean()
        return loss


class PCA(nn.Module):
    def __init__(self, patch=16, width=32):
        super().__init__()
        self.p = PatchPCA(patch, width)
        self.patch = patch
        self.M = (128 // patch) ** 2

    def encode(self, x, f):
        return self.p.encode(x)

    def quantise(self, z):
        return z, 0, None

    def decode(self, z):
        return patches(self.p.decode(z, 128 // self.patch) * 255)


def probe(z, rows):
    """Linear read-out of agentview's tokens [n, M, D]: a weight of each thing picks tokens, whose place is linear; cm."""
    with torch.inference_mode(False):
        z = z.clone()
    held_, possible, alt = held[rows], rest["possible"][rows], rest["alt"][rows][..., :2]
    with torch.inference_mode(False):
        z = (z - z[~held_].mean((0, 1))) / (z[~held_].std((0, 1)) + 1e-6)
        M, D_ = z.shape[1:]
    with torch.inference_mode(False), torch.enable_grad():
        w = nn.Parameter(torch.randn(D_, 10) * 0.05)
        u = nn.Parameter(torch.zeros(D_, 2))
        c = nn.Parameter(torch.zeros(M, 2) + alt[possible].mean(0))
        opt = torch.optim.Adam([w, u, c], 3e-2)
        tr = torch.where(~held_)[0]
        g = torch.Generator().manual_seed(0)

        def read(i):
            return torch.einsum("bmt,bmx->btx", (z[i] @ w).softmax(1), z[i] @ u + c)

        for s in range(600):
            for q in opt.param_groups:
                q["lr"] = 3e-2 * (1 - s / 600)
            i = tr[torch.randint(len(tr), (256,), generator=g)]
            l = ((read(i) - alt[i]).norm(dim=-1) * possible[i]).sum() / possible[i].sum()
            opt.zero_grad()
            l.backward()
            opt.step()
    te = torch.where(held_)[0]
    with torch.inference_mode():
        return float((read(te) - alt[te]).norm(dim=-1)[possible[te]].mean()) * 100


class TokenPredictor(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.enter = nn.Linear(width, H)
        self.pos = nn.Parameter(torch.randn(tokens, H) * 0.02)
        self.given = nn.Linear(8 + 56, H)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.leave = nn.Linear(H, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z, s, c):
        h = self.enter(z) + self.pos + self.given(torch.cat([s, c.flatten(1)], 1))[:, None]
        for b in self.blocks:
            h = b(h)
        return z + self.leave(h)


ARMS = {
    "pca": None,
    "pca32": None,
    "base": {},
    "align": {"align": 0.1},
    "align0": {"align": 0.0},
    "frozen": {"frozen": 1},
    "three0": {"three": "plain"},
    "three": {"three": "semantic"},
    "queries": {"queries": "causal", "M": 16, "prefix": 1},
    "queries0": {"queries": "full", "M": 16},
    "slots": {"slots": "compete", "M": 6},
    "slots0": {"slots": "plain", "M": 6},
    "codes": {"codes": 1},
    "levels": {"codes": 1, "levels": 4},
    "wide": {"codes": 1, "narrow": 32},
    "dual": {"dual": "one"},
    "dual2": {"dual": "two"},
    "keep": {"keep": "learned"},
    "keep0": {"keep": "random"},
    "noise": {"noise": 1},
}


def main(arm, seed=0, predict=True):
    start = time.time()
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    need = arm not in ("pca", "pca32")
    o = ARMS[arm] or {}
    feats = (
        Features()
        if need and (o.get("frozen") or o.get("align") or o.get("three") == "semantic" or o.get("dual"))
        else None
    )
    fw = 0
    if feats is None:
        feat = lambda x: None
        fw = 2 * 96
    else:
        probe_x = torch.from_numpy(np.array(before[:64, 0]))
        f = feats(probe_x)
        fw = f.shape[-1]
        mean, std = f.mean((0, 1)), f.std((0, 1)) + 1e-6
        feat = lambda x: (feats(x) - mean) / std
    frames = lambda rows, src=before: torch.from_numpy(src[rows.numpy()]).flatten(0, 1)
    draw = lambda n: train[torch.randint(len(train), (n,), generator=g)]
    if not need:
        tok = PCA(32 if arm == "pca32" else 16)
        tok.p.fit(frames(draw(256)))
    else:
        tok = Tokenizer(o, fw)
        opt = torch.optim.AdamW(tok.parameters(), 2e-3, weight_decay=0.01)
        for s in range(STEPS):
            for q in opt.param_groups:
                q["lr"] = 2e-3 * min((s + 1) / 30, 0.5 * (1 + math.cos(math.pi * max(0, s - 30) / (STEPS - 30))))
            x = frames(draw(BATCH // 2), before if s % 2 else after)
            if o.get("codes") or o.get("dual"):
                whole = tok.book if o.get("codes") else tok
                if s == 0:
                    whole.begin = 0
                if s == STEPS // 3:
                    tok.start(x, feat(x))
            l = tok.loss(x, feat(x), g)
            opt.zero_grad()
            l.backward()
            nn.utils.clip_grad_norm_(tok.parameters(), 1.0)
            opt.step()
    tok.eval()
    out = {
        "arm": arm,
        "seed": seed,
        "parameters": sum(p.numel() for p in tok.parameters()),
        "seconds": time.time() - start,
    }
    # latents of all
    with torch.inference_mode():

        def enc(src, rows):
            zs, idx, sem = [], [], []
            for r in rows.split(64):
                x = frames(r, src)
                z, _, i = tok.quantise(tok.encode(x, feat(x)))
                zs.append(z)
                if i is not None:
                    idx.append(i)
                if o.get("three"):
                    tok.decode(z)
                    sem.append(tok.semantic)
            return torch.cat(zs), torch.cat(idx) if idx else None, torch.cat(sem) if sem else None

        n = len(episodes)
        rows = torch.arange(0, n, 1 if predict else 2)
        z, idx, sem = enc(before, rows)
        half = torch.arange(0, len(rows), 2 if predict else 1)
        mse = []
        for r in test[::4].split(64):
            x = frames(r)
            zz, _, _ = tok.quantise(tok.encode(x, feat(x)))
            mse.append((tok.decode(zz).clamp(0, 1) - patches(x)).square().mean((1, 2)))
        out["psnr"] = float(-10 * torch.log10(torch.cat(mse)).mean())
        zf = z.unflatten(0, (-1, 2))
        out["probe_cm"] = probe(zf[half][:, 0].clone(), rows[half])
        if sem is not None:
            out["probe_semantic_cm"] = probe(sem.unflatten(0, (-1, 2))[half][:, 0].clone(), rows[half])
        if idx is not None:
            for l in range(idx.shape[-1]):
                p = torch.bincount(idx[..., l].flatten(), minlength=256).float()
                p = p / p.sum()
                out[f"perplexity{l}"] = float(torch.exp(-(p * (p + 1e-12).log()).sum()))
    if not predict:
        print(json.dumps(out), flush=True)
        return
    # M1
    with torch.inference_mode():
        za, _, _ = enc(after, torch.arange(n))
        za = za.unflatten(0, (n, 2))
    scale = zf.std()
    T = zf.shape[2]
    A, B = (zf / scale).flatten(1, 2).clone(), (za / scale).flatten(1, 2).clone()

    def norm(v):
        m, s = v[train].mean(0), v[train].std(0) + 1e-6
        return lambda u: (u - m) / s

    ns, nc = norm(rest["state"]), norm(rest["chunk"])
    torch.manual_seed(seed)
    pred = TokenPredictor(2 * T, A.shape[-1])
    opt = torch.optim.AdamW(pred.parameters(), 2e-3, weight_decay=0.01)
    for s in range(PSTEPS):
        for q in opt.param_groups:
            q["lr"] = 2e-3 * min((s + 1) / 30, 0.5 * (1 + math.cos(math.pi * max(0, s - 30) / (PSTEPS - 30))))
        r = draw(64)
        l = F.mse_loss(pred(A[r], ns(rest["state"][r]), nc(rest["chunk"][r])), B[r])
        opt.zero_grad()
        l.backward()
        nn.utils.clip_grad_norm_(pred.parameters(), 1.0)
        opt.step()
    ref = PatchPCA(16, 32)
    ref.fit(frames(torch.arange(0, n, 12)))
    fix = lambda y: ref.encode((unpatch(y).clamp(0, 1) * 255))
    with torch.inference_mode():

        def ratio(two):
            e = c = torch.zeros(2).double()
            rows = test[rest["has2"][test]] if two else test
            for r in rows.split(64):
                s, ch = ns(rest["state"][r]), nc(rest["chunk"][r])
                p = pred(A[r], s, ch)
                if two:
                    p = pred(p, ns(rest["state2"][r]), nc(rest["chunk2"][r]))
                b, a = frames(r), frames(r, after2 if two else after)
                y = fix(tok.decode((p * scale).unflatten(1, (2, T)).flatten(0, 1)))
                zr, zb = ref.encode(a), ref.encode(b)
                ch_ = ref.change(b, a) > 1e-3
                e = e + ((y - zr).square().mean(-1) * ch_).unflatten(0, (-1, 2)).sum((0, 2)).double()
                c = c + ((zb - zr).square().mean(-1) * ch_).unflatten(0, (-1, 2)).sum((0, 2)).double()
            return float(e.sum() / c.sum()), (e / c).tolist()

        out["copy_ratio"], out["views"] = ratio(False)
        out["copy_ratio_2K"], _ = ratio(True)
    out["total_seconds"] = time.time() - start
    print(json.dumps(out), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstrations")
    parser.add_argument("arms", nargs="+", help=", ".join(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    before, after, after2, rest = prepare(given.demonstrations)
    episodes = rest["episode"]
    held = episodes % 5 == 4
    train, test = torch.where(~held)[0], torch.where(held)[0]
    for arm in given.arms:
        main(arm.strip("+"), given.seed, arm.endswith("+"))
