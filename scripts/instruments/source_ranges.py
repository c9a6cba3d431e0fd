import csv,sys
n=sys.argv[1]; T=float(sys.argv[2]); thr=int(sys.argv[3])
rows=list(csv.reader(open(n)))[1:]; h=rows[0]; rows=rows[1:]
tot=sum(int(r[2]) for r in rows); K=T*16*132/tot
S={h[i][6:]:i for i in range(32,50)}
for a in sys.argv[4:]:
    lo,hi=map(int,a.split('-')); t=0; st={}; n=0
    for r in rows[lo:hi+1]:
        e=int(r[5])
        if e<thr: continue
        n+=1; t+=int(r[2])*K/e
        for k,j in S.items(): st[k]=st.get(k,0)+int(r[j])*K/e
    print(a,'instr',n,'cycles',round(t),{k:round(v) for k,v in sorted(st.items(),key=lambda x:-x[1]) if v>t*0.04})
