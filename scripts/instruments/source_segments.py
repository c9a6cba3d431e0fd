import csv,sys
n=sys.argv[1]; T=float(sys.argv[2]); warps=int(sys.argv[3]); thr=int(sys.argv[4])
rows=list(csv.reader(open(n)))[1:]; h=rows[0]; rows=rows[1:]
tot=sum(int(r[2]) for r in rows); K=T*warps*132/tot
S={h[i][6:]:i for i in range(32,50)}
# segments: contiguous runs of instructions with similar exec count
cur=None; out=[]
for i,r in enumerate(rows):
    e=int(r[5]); s=int(r[2])
    b=0 if e<thr else 1
    if cur is None or b!=cur['b']:
        cur={'b':b,'lo':i,'n':0,'ex':0,'s':0,'st':{}}; out.append(cur)
    cur['hi']=i; cur['n']+=1; cur['s']+=s; cur['ex']+=e
    for k,j in S.items(): cur['st'][k]=cur['st'].get(k,0)+int(r[j])
print('K',K,'total',tot)
for c in out:
    if c['s']>tot*0.01: print(c['lo'],c['hi'],'hot' if c['b'] else 'cold','instr',c['n'],'exec',c['ex'],'samples %.3f'%(c['s']/tot), sorted(((k,round(v/c['s'],2)) for k,v in c['st'].items()),key=lambda x:-x[1])[:6])
