import csv,sys
n=sys.argv[1]; T=float(sys.argv[2]); warps=int(sys.argv[3]); lo,hi=int(sys.argv[4]),int(sys.argv[5]); thr=float(sys.argv[6]) if len(sys.argv)>6 else 0
rows=list(csv.reader(open(n)))[1:]; h=rows[0]; rows=rows[1:]
tot=sum(int(r[2]) for r in rows); K=T*warps*132/tot
print('samples',tot,'cycles a sample',K)
S={h[i][6:]:i for i in range(32,50)}
per={}
for k,i in S.items(): per[k]=sum(int(r[i]) for r in rows)
print({k:round(v/tot,3) for k,v in per.items() if v>tot*0.005})
for i,r in enumerate(rows[lo:hi],lo):
    e=int(r[5]); s=int(r[2])
    if e==0: continue
    c=s*K/e
    top=sorted(((int(r[j]),k) for k,j in S.items()),reverse=True)[:3]
    if c>=thr: print(i,e,f"{c:6.1f}",' '.join(f"{k}:{v*K/e:.0f}" for v,k in top if v*K/e>=1).ljust(44),r[1].strip()[:80])
