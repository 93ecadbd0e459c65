"""Records tests/it/reference.json: vectors of all-MiniLM-L6-v2 by a second implementation, in f64 numpy.

    python3 -m venv /tmp/ref && /tmp/ref/bin/pip install numpy safetensors tokenizers
    /tmp/ref/bin/python shared/embed/tests/reference.py ~/.cache/infera/models/all-minilm-l6-v2
"""
import json, math, pathlib, sys
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

D = sys.argv[1].rstrip('/') + '/'
W={k:v.astype(np.float64) if v.dtype!=np.int64 else v for k,v in load_file(D+'model.safetensors').items()}
T=Tokenizer.from_file(D+'tokenizer.json'); T.no_padding(); T.enable_truncation(256)
erf=np.vectorize(math.erf)
def ln(x,p): 
    m=x.mean(-1,keepdims=True); v=x.var(-1,keepdims=True)
    return (x-m)/np.sqrt(v+1e-12)*W[p+'.weight']+W[p+'.bias']
def lin(x,p): return x@W[p+'.weight'].T+W[p+'.bias']
def embed(t):
    ids=T.encode(t).ids
    x=W['embeddings.word_embeddings.weight'][ids]+W['embeddings.position_embeddings.weight'][:len(ids)]+W['embeddings.token_type_embeddings.weight'][0]
    x=ln(x,'embeddings.LayerNorm')
    for i in range(6):
        p=f'encoder.layer.{i}.'
        h=lambda n: lin(x,p+'attention.self.'+n).reshape(len(ids),12,32).transpose(1,0,2)
        q,k,v=h('query'),h('key'),h('value')
        s=q@k.transpose(0,2,1)/math.sqrt(32); s=np.exp(s-s.max(-1,keepdims=True)); s/=s.sum(-1,keepdims=True)
        o=(s@v).transpose(1,0,2).reshape(len(ids),384)
        x=ln(lin(o,p+'attention.output.dense')+x,p+'attention.output.LayerNorm')
        g=lin(x,p+'intermediate.dense'); g=g*0.5*(1+erf(g/math.sqrt(2)))
        x=ln(lin(g,p+'output.dense')+x,p+'output.LayerNorm')
    m=x.mean(0); return m/np.linalg.norm(m)
texts=["Paris is the capital of France.","Der Fluss fließt; 42 °C?","def f(x):\n    return x ** 2"]
vs=[embed(t) for t in texts]
here = pathlib.Path(__file__).parent / 'it' / 'reference.json'
rows = [{'text': t, 'vector': [round(float(x), 7) for x in v]} for t, v in zip(texts, vs)]
here.write_text(json.dumps(rows, ensure_ascii=False, separators=(',', ':')) + '\n')
