"The rules for new rows against slow plain code in float64."
import numpy as np, pytest, torch
from seqwarm.core.errors import Refusal
from seqwarm.core.plan import OPS
from seqwarm.methods import embed

# ---- the rules against plain loops in float64 -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def space():
    g = torch.Generator().manual_seed(5)
    S = torch.randn(70, 11, generator=g, dtype=torch.float64) + 0.3
    H = torch.randn(60, 6, generator=g, dtype=torch.float64) + 0.2
    H[50] = 0  # a missing token that the helper never saw
    perm = torch.randperm(70, generator=g)
    origin = torch.cat([perm[:42], torch.full((18,), -1), torch.tensor([-2, -2])])
    return S, H, origin, torch.arange(2, 42)  # ids 0 and 1 are special: copied, no anchors

def weights_slow(method, S, H, origin, anchors, temperature=0.1, top_k=None, ridge=1e-3):
    "|missing| x |shared| weights by plain loops: the definition."
    Hn, Sn, an = H.numpy(), S.numpy(), anchors.tolist()
    A = np.stack([Sn[origin[j]] for j in an]); m = A.mean(0)
    r = np.sqrt(((A - m)**2).sum(1).mean())
    out = []
    for i in torch.nonzero(origin == -1)[:, 0].tolist():
        h = Hn[i]; n = np.linalg.norm(h)
        if n == 0: out.append(np.full(len(an), 1/len(an))); continue
        c = np.array([h @ Hn[j]/n/np.linalg.norm(Hn[j]) for j in an])
        if method == "clp": w = c/c.sum()
        if method == "guarded":
            z = max(c.sum(), np.linalg.norm(sum(cj*(a - m) for cj, a in zip(c, A)))/r)
            w = c/z + (1 - c.sum()/z)/len(an)
        if method == "softmax":
            e = np.exp((c - c.max())/temperature)
            if top_k: e[np.argsort(-c)[top_k:]] = 0
            w = e/e.sum()
        if method == "clp+":   # by sorting (Martins & Astudillo 2016, algorithm 1)
            z = c/temperature; u = np.sort(z)[::-1]; k = np.arange(1, len(u) + 1)
            k = k[1 + k*u > np.cumsum(u)].max()
            w = np.maximum(z - (np.sort(z)[::-1][:k].sum() - 1)/k, 0)
        if method == "mean": w = np.full(len(an), 1/len(an))
        if method == "lstsq":
            C = np.stack([Hn[j] for j in an]); C = C - (mid := C.mean(0)); G = C.T @ C
            w = 1/len(an) + (h - mid) @ np.linalg.inv(G + ridge*np.trace(G)/len(G)*np.eye(len(G))) @ C.T
        out.append(w)
    return torch.tensor(np.stack(out))

def call(op, S, H, origin, anchors, E=None, **kw):
    tables = (S, H) if E is None else (S, H, E)
    return OPS[op](*tables, shape=(len(origin), S.shape[1]), origin=origin, anchors=anchors, **kw)

CASES = [("clp", {}), ("guarded", {}), ("lstsq", {"ridge": 1e-3}), ("softmax", {"temperature": 0.1}), ("softmax", {"temperature": 0.3, "top_k": 5}),
         ("clp+", {"temperature": 1.0}), ("clp+", {"temperature": 0.05})]

@pytest.mark.parametrize("method,options", CASES)
def test_rows_are_those_of_the_slow_rule(method, options, space):
    S, H, origin, anchors = space
    want = weights_slow(method, S, H, origin, anchors, **options) @ S[origin[anchors]]
    got = call(f"embed.{method}", S, H, origin, anchors, **options)
    assert ((got[42:60] - want).norm(dim=1)/want.norm(dim=1)).max() < 1e-10
    dense = embed.weights(f"embed.{method}", H, S, dict(origin=origin, anchors=anchors), torch.arange(42, 60), options)
    assert torch.allclose(dense, weights_slow(method, S, H, origin, anchors, **options))
    assert torch.equal(got[:42], S[origin[:42]])                               # shared and special rows: the same bits
    assert torch.allclose(got[60:], S[origin[anchors]].mean(0).expand(2, -1))  # padding: the mean

@pytest.mark.parametrize("method,options", CASES)
def test_weights_sum_to_one_and_serve_a_head_too(method, options, space):
    "An identity for S hands out the weights; E is what the guard goes by."
    S, H, origin, anchors = space
    E = S if method == "guarded" else None
    w = call(f"embed.{method}", torch.eye(70, dtype=torch.float64), H, origin, anchors, E, **options)[42:60]
    assert torch.allclose(w.sum(1), torch.ones(18).double(), atol=1e-5)
    assert torch.allclose(w[:, origin[anchors]], weights_slow(method, S, H, origin, anchors, **options), atol=1e-5)
    bias = torch.randn(1, 70, generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # another axis, another width
    tables = (bias, H) if E is None else (bias, H, E)
    out = OPS[f"embed.{method}"](*tables, shape=(1, 62), origin=origin, anchors=anchors, axis=1, **options)
    assert torch.allclose(out[0, 42:60], w @ bias[0], atol=1e-4)

def test_the_guard_bounds_what_the_paper_does_not(space):
    S, H, origin, anchors = space
    H, z = H.clone(), torch.nn.functional.normalize(H[anchors], dim=1).sum(0)
    H[45] -= (H[45] @ z/(z @ z) - 1e-9)*z                                      # almost at right angles to the sum
    H[46] = -z                                                                 # all on the wrong side
    A = S[origin[anchors]]; m = A.mean(0); r = (A - m).norm(dim=1).square().mean().sqrt()
    paper, guarded = call("embed.clp", S, H, origin, anchors), call("embed.guarded", S, H, origin, anchors)
    assert (paper[45] - m).norm() > 1e5*r and ((guarded[42:60] - m).norm(dim=1) <= r*(1 + 1e-9)).all()
    assert (paper[46] - m) @ (guarded[46] - m) < 0
    assert torch.allclose(guarded[50], m) and torch.allclose(paper[50], m)      # a token that the helper never saw
    sound = H + 20*z/z.norm()                                                  # a narrow cone: the paper's rule is sound, nothing is changed
    assert torch.allclose(call("embed.clp", S, sound, origin, anchors), call("embed.guarded", S, sound, origin, anchors), atol=1e-12)

def test_float32_is_as_good_as_float64_and_chunks_do_not_show(space, monkeypatch):
    S, H, origin, anchors = space
    want = call("embed.guarded", S, H, origin, anchors)
    assert (call("embed.guarded", S.float(), H.float(), origin, anchors) - want).abs().max() < 1e-5
    whole = call("embed.softmax", S, H, origin, anchors)
    monkeypatch.setattr(embed, "_blocks", lambda ids, width: ids.split(7)); monkeypatch.setattr(embed, "_BYTES", 1000)
    assert torch.allclose(call("embed.guarded", S, H, origin, anchors), want, atol=1e-12)
    assert torch.allclose(call("embed.softmax", S, H, origin, anchors), whole, atol=1e-6)

def test_controls(space):
    S, _, origin, anchors = space
    S = S*torch.linspace(0.1, 3, 11)
    big = torch.cat([origin, torch.full((4000,), -1)])
    draw = lambda **kw: OPS["embed.random"](S, shape=(len(big), 11), origin=big, anchors=anchors, seed=1, **kw)
    a, b = draw(), draw(copy=True)
    assert torch.equal(a[:2], S[big[:2]]) and not torch.equal(a[2:42], S[big[2:42]])      # random: specials only
    assert torch.equal(b[:42], S[big[:42]]) and torch.equal(a[42:60], b[42:60])
    assert torch.allclose(a[62:].mean(0), S.mean(0), atol=0.2) and torch.allclose(a[62:].std(0), S.std(0), rtol=0.1)

def test_what_is_not_finite_is_not_written(space):
    S, H, origin, anchors = space
    H = H.clone()
    H[44] = float("inf")
    with pytest.raises(Refusal, match="use the method 'guarded'"): call("embed.clp", S, H, origin, anchors)

def test_procrustes_is_the_best_rotation(space):
    "No small turn and no other scale of the map brings the anchors nearer; and it is the square problem's solution on padded spaces."
    S, H, origin, anchors = space
    A, C = S[origin[anchors]], H[anchors]
    m, mid = A.mean(0), C.mean(0)
    wide = torch.nn.functional.pad(C - mid, (0, 5))                               # 6 to 11 dimensions
    U, s, V = np.linalg.svd(wide.numpy().T @ (A - m).numpy())
    R, scale = torch.tensor(U @ V), s.sum()/float((C - mid).square().sum())
    want = m + (torch.nn.functional.pad(H[42:50] - mid, (0, 5)) @ R)*scale
    got = call("embed.procrustes", S, H, origin, anchors)
    error = lambda R, scale: float((wide @ R*scale - (A - m)).square().sum())
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        X = torch.randn(11, 11, generator=g, dtype=torch.float64)*0.05
        assert error(R @ torch.matrix_exp(X - X.T), scale) > error(R, scale) < error(R, scale*1.01) and error(R, scale) < error(R, scale*0.99)
    # padded dimensions may be mapped anywhere, and are zero: the images agree
    assert torch.allclose(got[42:50], want) and torch.allclose(got[50], m)
    narrow = call("embed.procrustes", S[:, :4].contiguous(), H, origin, anchors)     # and from a wider helper
    assert narrow.shape == (62, 4) and torch.isfinite(narrow).all()

def test_mixtures(space):
    S, _, origin, anchors = space
    n = int((origin == -1).sum())
    flat, offsets = torch.arange(2*n) % 70, torch.arange(n + 1)*2
    w = torch.rand(2*n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mix = lambda **kw: OPS["embed.mix"](S, shape=(62, 11), origin=origin, anchors=anchors, flat=flat, offsets=offsets, **kw)[42:60]
    assert torch.allclose(mix(weights=w), (w[:, None]*S[flat]).view(n, 2, 11).sum(1)) and torch.allclose(mix(), S[flat].view(n, 2, 11).mean(1))
    offsets = torch.tensor([0]*3 + list(range(2, 2*(n - 1), 2)))                     # tokens without pieces
    assert torch.allclose(mix()[:2], S[origin[anchors]].mean(0).expand(2, -1))

@pytest.mark.parametrize("method", sorted(m for m in embed.METHODS if m not in ("wechsel", "fvt")))
def test_norm_brings_new_rows_to_the_length_of_copied_ones(method, space):
    S, H, origin, anchors = space
    rule = embed.METHODS[method]
    kw = dict(shape=(62, 11), origin=origin, anchors=anchors, **rule.args) | ({"seed": 1} if "random" in rule.op else {})
    plain, normed = (OPS[rule.op](*{"S": (S,), "SH": (S, H), "SHE": (S, H)}[rule.tables], **kw, norm=n) for n in (False, True))
    cos = torch.nn.functional.cosine_similarity(plain[42:60], normed[42:60])
    assert torch.allclose(normed[42:60].norm(dim=1), S[origin[anchors]].norm(dim=1).median().expand(18)) and torch.allclose(cos, torch.ones(18).double())
    if method != "random": assert torch.equal(plain[:42], normed[:42])
    bias = S[:, :1].T.contiguous()                                                  # a bias has no direction
    kw |= dict(shape=(1, 62), axis=1)
    assert torch.equal(*(OPS[rule.op](*{"S": (bias,), "SH": (bias, H), "SHE": (bias, H, S)}[rule.tables], **kw, norm=n) for n in (False, True)))

def test_noise_belongs_to_the_token():
    "Whatever the blocks in which rows are made, and whichever rows are copied."
    S = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    last = torch.empty(0, 3)
    for n in (10, 5000, 9000):
        origin = torch.full((n,), -1); origin[:4] = torch.arange(4)
        rows = OPS["embed.random"](S, shape=(n, 3), origin=origin, anchors=torch.arange(2, 4), seed=3)
        assert torch.equal(rows[:len(last)], last)
        last = rows
