import re,sys,collections
fn=sys.argv[1]; pat=sys.argv[2]; step=int(sys.argv[3])
cur=None; ops=[]
for line in open(fn):
    if 'Function :' in line:
        if cur: break
        if re.search(pat,line): cur=line.strip()
        continue
    if cur:
        m=re.match(r'\s+/\*([0-9a-f]+)\*/\s+(.*?);',line)
        if m:
            s=re.sub(r'^@!?U?P\d\s+','',m.group(2)); ops.append(s.split()[0])
print(cur,len(ops))
interesting=('HGMMA','BAR','LD','ST','SYNCS','UTMALDG','MUFU','ATOM','WARPSYNC','F2F','SHFL','CS2R','USETMAXREG','EXIT','BRA')
for b in range(0,len(ops),step):
    c=collections.Counter(o.split('.')[0] if not o.startswith(('LD','ST')) else '.'.join(o.split('.')[:2]) for o in ops[b:b+step])
    print(b,' '.join(f"{k}:{v}" for k,v in sorted(c.items()) if k.startswith(interesting)))
